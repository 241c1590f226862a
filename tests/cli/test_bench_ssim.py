import argparse
import json

import pytest
import torch

from kd_det.cli import bench_ssim
from kd_det.cli.device_cost import kept_bytes, peak_bytes, take_turns
from kd_det.functional.ssim import ssim_loss

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


def test_kept_bytes_counts_each_storage_once_and_no_input():
    x = torch.ones(1000, requires_grad=True)

    def run() -> torch.Tensor:
        y = x.exp()  # kept by exp and, seen through a view, by the product
        return (y.view(10, 100) * y.view(10, 100)).sum() + (x * x).sum()

    assert kept_bytes(run, [x]) == 4000


def test_peak_bytes_of_the_loss_is_its_gradient_and_the_chunks():
    student, teacher = torch.rand(2, 2, 64, 40, 40)
    student.unsqueeze_(0), teacher.unsqueeze_(0)
    student = student[:, 0].requires_grad_()
    one_map = student.numel() * 4

    def run() -> None:
        torch.autograd.grad(ssim_loss(student, teacher[:, 0], chunk_elements=1600), student)

    # The gradient kept and the gradient returned; scratch memory of one plane is small beside them.
    assert 2 * one_map < peak_bytes(run, "cpu") < 2.5 * one_map


def test_turns_are_taken_in_rounds():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(runs, 3, "cpu")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert "".join(order).endswith("aaaaabbbbb" * 3)
