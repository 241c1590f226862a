"""The present intervals of a report that was written with earlier ones."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kd_det.evaluation.difference import mean_difference

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reissue.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reissue", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_images_part_is_what_the_seeds_leave_of_the_earlier_width(script: ModuleType) -> None:
    # Seeds 0.2, 0.4, 0.6: sample variance 0.04, of which the earlier drawing showed 2/9. Images:
    # 0.01. The width is that of a normal distribution with both.
    half = 1.959964 * math.sqrt(0.01 + 0.04 * 2 / 9)
    found = script.reissued([0.2, 0.4, 0.6], 0.4 - half, 0.4 + half, 400)
    assert found.image_sd == pytest.approx(0.1, abs=1e-6)
    exact = mean_difference(
        np.array([0.2, 0.4, 0.6]), np.full((3, 3), 0.01), images=400, resamples=1000
    )
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_a_report_keeps_its_numbers_and_gets_the_new_keys(script: ModuleType) -> None:
    def arm(name: str, aps: list[float], delta: dict[str, float] | None) -> dict[str, Any]:
        return {"name": name, "AP": aps, "delta": delta, "seeds": [0, 1]}

    report = {
        "name": "r",
        "baseline": "a",
        "test_set": {"images": 100},
        "arms": [
            arm("a", [1.0, 2.0], None),
            arm("b", [2.0, 3.1], {"mean": 1.05, "low": 0.9, "high": 1.2}),
            arm("c", [1.5, 2.0], {"mean": 0.25, "low": 0.0, "high": 0.5}),
        ],
        "comparisons": [
            {"arm": "b", "against": "c", "delta": {"mean": 0.8, "low": 0.5, "high": 1.1}}
        ],
    }
    found = script.reissue(report)
    assert found["arms"][0] == report["arms"][0]
    delta = found["arms"][1]["delta"]
    assert delta["mean"] == pytest.approx(1.05) and delta["seed_sd"] == pytest.approx(0.05 * 2**0.5)
    assert delta["holm"] >= delta["p"] and "bounded by an earlier bootstrap" in delta["method"]
    assert found["comparisons"][0]["delta"]["verdict"] == "inconclusive"
    assert found["power"]["effect"] == 0.5
    with pytest.raises(SystemExit, match="present intervals already"):
        script.reissue(found)
    report["arms"][1]["AP"] = [2.0, 3.0]
    with pytest.raises(SystemExit, match="not the difference"):
        script.reissue(report)
