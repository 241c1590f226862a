import argparse
import json

import pytest
import torch

from kd_det.bench import ssim as bench_ssim
from kd_det.bench.measure import peak_bytes
from kd_det.functional.ssim import SSIMOptions, ssim_loss

pytest.importorskip("kornia", reason="the bench group is not installed")


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_ssim.add_arguments(parser)
    return parser.parse_args(options)


def test_quick_run_compares_all_libraries(capsys):
    report = json.loads(json.dumps(bench_ssim.main(parse("--quick"))))
    assert report["shapes"]["p3"] == [2, 8, 16, 24] and report["shapes"]["p7"] == [2, 8, 1, 2]
    libraries = {"kd_det", "kornia", "torchmetrics", "pytorch-msssim", "piq"}
    assert set(report["versions"]) == set(report["p3"]) == libraries
    # The small levels are out of reach for libraries that pad by half a window or not at all.
    runs = {name: row["levels"] for name, row in report["pyramid"].items()}
    assert runs == {"kd_det": 5, "kornia": 2, "torchmetrics": 2, "pytorch-msssim": 1, "piq": 1}
    failed = {(failure["library"], failure["level"]) for failure in report["failures"]}
    assert ("kornia", "p5") in failed and ("pytorch-msssim", "p4") in failed
    assert len(failed) == 5 * 5 - sum(runs.values())
    # All compute the same where they can, this package with one map kept and the others with many.
    for name, row in report["p3"].items():
        assert row["value_error"] < 1e-6 and row["grad_error"] < 1e-4, name
    assert report["p3"]["kd_det"]["kept_maps"] == report["pyramid"]["kd_det"]["kept_maps"] == 1
    assert report["p3"]["kd_det"]["x"] == report["pyramid"]["kd_det"]["x"] == 1
    assert all(row["kept_maps"] > 5 for name, row in report["p3"].items() if name != "kd_det")
    assert all(len(report["levels"]["p3"][name]) == report["rounds"] for name in libraries)
    assert report["floor"]["pyramid_ms"] > report["floor"]["p3_ms"] > 0
    assert "kornia cannot run p5: " in capsys.readouterr().out


def test_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "piq", None)
    with pytest.raises(ModuleNotFoundError, match="uv sync --group bench"):
        bench_ssim.load_libraries()


def test_peak_bytes_of_the_loss_is_its_gradient_and_the_chunks():
    student, teacher = torch.rand(2, 2, 64, 40, 40)
    student.unsqueeze_(0), teacher.unsqueeze_(0)
    student = student[:, 0].requires_grad_()
    one_map = student.numel() * 4
    options = SSIMOptions(chunk_elements=1600)

    def run() -> None:
        torch.autograd.grad(ssim_loss(student, teacher[:, 0], options), student)

    # The gradient kept and the gradient returned; scratch memory of one plane is small beside them.
    assert 2 * one_map < peak_bytes(run, "cpu") < 2.5 * one_map
