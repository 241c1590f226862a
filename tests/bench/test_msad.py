import argparse
import json

import pytest
from detectron2.modeling import build_model
from test_configs import FOLDER

from kd_det.bench import msad as bench_msad
from kd_det.config import load_config, student_cfg


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_msad.add_arguments(parser)
    return parser.parse_args(options)


def test_quick_run_counts_and_times_all_models(capsys):
    report = json.loads(json.dumps(bench_msad.main(parse("--quick"))))
    rows = {(row["width"], row["model"]): row for row in report["rows"]}
    assert set(rows) == {(w, m) for w in (0.5, 0.25) for m in ("full", "aligned", "plain")}
    for (width, name), row in rows.items():
        (seconds,) = report["seconds"][f"{name} {width:g}"]
        assert row["ms"] == pytest.approx(1e3 * seconds) and row["ms"] > 0
        assert row["ratio"] == pytest.approx(row["gmac"] / rows[width, "full"]["gmac"])
        assert 0 < row["resnet_gmac"] < row["gmac"]
    assert rows[0.25, "full"]["ratio"] == rows[0.25, "full"]["ms_ratio"] == 1
    assert "resnet_ratio" in capsys.readouterr().out


def test_the_head_takes_most_of_what_the_backbone_saves():
    """Ratios are those worked out by hand for 832x1344: 0.68 and 0.96 of 225 and 135 GMAC."""
    report = bench_msad.run(device="cpu", size=(128, 192), widths=[1.0, 0.25], rounds=0)
    rows = {(row["width"], row["model"]): row for row in report["rows"]}
    assert rows[1.0, "aligned"]["ratio"] == pytest.approx(0.68, abs=0.02)
    assert rows[0.25, "aligned"]["ratio"] == pytest.approx(0.96, abs=0.01)
    for width in (1.0, 0.25):
        assert rows[width, "plain"]["ratio"] == pytest.approx(0.25, abs=0.01)
        # The ResNet alone is what "a quarter" is said of.
        assert rows[width, "aligned"]["resnet_ratio"] == pytest.approx(0.25, abs=1e-6)
    assert "ms" not in rows[1.0, "full"] and report["seconds"] == {}


def test_measured_students_are_those_of_the_configs():
    for percent in (100, 25):
        path = FOLDER / "coco" / "msad" / f"fcos_r50_w{percent:03}_student.yaml"
        cfg = student_cfg(load_config(str(path)))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.RESNETS.NORM = "BN"
        expected = {k: v.shape for k, v in build_model(cfg).state_dict().items()}
        model = build_model(bench_msad.fcos_cfg(percent / 100, finest_p2=True))
        assert {k: v.shape for k, v in model.state_dict().items()} == expected


def test_sizes_that_the_two_models_would_pad_differently_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        bench_msad.run(device="cpu", size=(96, 128), widths=[0.25], rounds=0)
