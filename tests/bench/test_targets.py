import argparse
import json
from typing import Any

import pytest
import torch

from kd_det.bench import measure, targets_loops, targets_scene
from kd_det.bench import targets as bench_targets
from kd_det.bench.pgd_scene import pyramid
from kd_det.bench.targets_scene import Assigned


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_targets.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture(autouse=True)
def _one_call_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_ROUND_SECONDS", 1e-6)


def test_quick_run_measures_everything(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(json.dumps(bench_targets.main(parse("--quick"))))
    assert report["positions"] == 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2 + 1
    rows = {(row["detector"], row["boxes"]): row for row in report["rows"]}
    detectors = ("atss", "autoassign", "ddod", "reppoints", "fsaf")
    assert set(rows) == {(name, count) for name in detectors for count in (1, 10)}
    for (name, count), row in rows.items():
        (batched,), (loop,) = (
            report["seconds"][f"{name} {count} {x}"] for x in ("batched", "loop")
        )
        assert row["speedup"] == pytest.approx(loop / batched)
        assert row["batched_ms"] == pytest.approx(1e3 * batched)
        assert 0 < row["batched_mb"] < 10
    assert "speedup" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench_targets.DETECTORS)
def test_loops_compute_what_the_detectors_do(name: str) -> None:
    """On crowded images, where boxes contend for positions."""
    size = (128, 192)
    scene = Assigned.random(pyramid(size), size, 40, "cpu")
    found, expected = (getattr(x, name)(scene) for x in (targets_scene, targets_loops))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(found[0].unique()) > 10, "the case must have positives"


def test_another_result_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scene: Assigned) -> list[Any]:
        owner, weights = targets_scene.fsaf(scene)
        return [owner + 1, weights]

    monkeypatch.setattr(targets_loops, "fsaf", wrong)
    with pytest.raises(AssertionError, match=r"not close|not equal"):
        bench_targets.main(parse("--quick"))
