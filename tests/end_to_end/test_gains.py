"""The smallest recipe, trained as the README says: no method falls below its control."""

import json
from pathlib import Path

import pytest

from kd_det_cli import main

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart" / "recipe.yaml"
# AP. Of a seed's difference to its control, twice the standard deviation that SSIM's has over the
# seeds of benchmarks/results/methods/report.json; L2's and PGD's are smaller. MSAD's, on half the
# pixels, is wider, and this one seed within it all the same.
NOISE = 2.8

pytestmark = pytest.mark.slow


def test_no_method_falls_below_its_control_by_more_than_noise(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra backbones")
    assert main(["compare", "--recipe", str(RECIPE), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    gains = {arm["name"]: arm["delta"]["mean"] for arm in report["arms"] if arm["delta"]}
    assert set(gains) == {"l2", "ssim", "pgd", "low_resolution", "msad"}
    gains["msad"] -= gains.pop("low_resolution")  # half the pixels, with and without MSAD's loss
    assert min(gains.values()) > -NOISE
    assert gains["l2"] > NOISE
