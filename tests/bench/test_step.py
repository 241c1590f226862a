import argparse
import json

import pytest
import torch

from kd_det.bench import measure
from kd_det.bench import step as bench_step
from kd_det.bench.step import DISTILLERS, STUDENT, TEACHER
from kd_det.distillation.detector import DistillationDetector
from kd_det.distillers import DISTILLER_REGISTRY

SMALL = {"depths": (18, 18), "channels": 16}


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    return parser.parse_args(options)


def test_quick_run_measures_every_distiller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_ROUND_SECONDS", 1e-6)
    report = json.loads(json.dumps(bench_step.main(parse("--quick", "--images", "1"))))
    rows = {row["part"]: row for row in report["rows"]}
    assert set(rows) == {STUDENT, TEACHER, *DISTILLERS}
    for name, row in rows.items():
        (seconds,), (step,) = report["seconds"][name], report["seconds"][STUDENT]
        assert row["ms"] == pytest.approx(1e3 * seconds) and row["ms"] > 0
        assert row["share"] == pytest.approx(seconds / step)
        assert row["peak_mb"] > 0
    # Of five levels, two 3x3 convolutions of 16 channels.
    assert rows["MGD"]["parameters"] == 5 * 2 * (16 * 16 * 9 + 16)
    assert rows["PKD"]["parameters"] == 0 and rows[STUDENT]["parameters"] > 10**7
    assert "share" in capsys.readouterr().out


def test_every_distiller_of_one_student_is_measured() -> None:
    own = {n for n, c in DISTILLER_REGISTRY if c.__module__.startswith("kd_det.distillers.")}
    assert own - set(DISTILLERS) == {"AlignedPyramid"}  # an L1 of pyramids, as FeatureLp


@pytest.fixture(scope="module")
def watched() -> tuple[DistillationDetector, bench_step.Batch]:
    torch.manual_seed(0)
    batch = bench_step.random_batch((64, 96), 2, 3)
    return bench_step.distillation("cpu", batch=batch, **SMALL), batch


def test_gradients_are_those_of_training(
    watched: tuple[DistillationDetector, bench_step.Batch],
) -> None:
    """What is timed is the whole loss: its gradient goes through to the captured outputs."""
    model, batch = watched
    for name, run in bench_step.added(model, batch).items():
        found = [x for x in run() if x is not None]
        assert found and all(x.isfinite().all() for x in found), name
        assert any(x.any() for x in found), name


def test_what_is_timed_leaves_the_models_alone(
    watched: tuple[DistillationDetector, bench_step.Batch],
) -> None:
    model, batch = watched
    for run in bench_step.added(model, batch).values():
        run()
    bench_step.train(model.student, batch)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
