"""The share of a distiller's gradient at the student's features."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher

from kd_det.distillation.gradient_share import FIRST, ShareWatch, measuring_period, pull


def test_hand_computed() -> None:
    """d(3a + 4b)/d(a, b) = (3, 4), norm 5; d(det) = (8, 6), norm 10; their product 48."""
    a, b = (torch.ones((), requires_grad=True) for _ in range(2))
    found = pull(3 * a + 4 * b, 8 * a + 6 * b, [a, b])
    assert [found.distiller.item(), found.detection.item(), found.dot.item()] == [5, 10, 48]
    assert found.ratio.item() == pytest.approx(0.5)
    assert found.cosine.item() == pytest.approx(48 / 50)


def test_only_tensors_that_the_loss_depends_on_count() -> None:
    """b is captured, but the distiller leaves it out: detection's gradient there is no matter."""
    a, b = (torch.ones((), requires_grad=True) for _ in range(2))
    found = pull(3 * a, 6 * a + 80 * b, [a, b])
    assert found.ratio.item() == pytest.approx(0.5)
    assert found.cosine.item() == pytest.approx(1.0)


def test_leaves_the_graph_and_the_gradients_alone() -> None:
    weight = torch.ones(2, requires_grad=True)
    feature = 2 * weight
    detection, loss = feature.sum(), feature.square().sum()
    pull(loss, detection, [feature])
    assert weight.grad is None
    (detection + loss).backward()
    assert torch.equal(weight.grad, torch.full((2,), 2.0 + 8.0))  # type: ignore[arg-type]


def test_small_float16_gradients_do_not_vanish() -> None:
    """5e-8 is less than the smallest float16 number; its share of 1e-5 is 5e-3."""
    feature = torch.ones(1, dtype=torch.float16, requires_grad=True)
    wide = feature.float()
    found = pull((wide * 5e-8).sum(), (wide * 1e-5).sum(), [feature])
    assert found.ratio.item() == pytest.approx(5e-3, rel=0.05)


def test_features_outside_the_graph_are_left_out() -> None:
    a, frozen = torch.ones((), requires_grad=True), torch.ones(())
    assert pull(2 * a, a, [a, frozen]).ratio.item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="carries no gradient"):
        pull(2 * a, a, [frozen])


def test_no_gradient_at_all_is_no_error() -> None:
    a, b = (torch.ones((), requires_grad=True) for _ in range(2))
    assert pull(a * 0, a, [a]).ratio.item() == 0
    assert math.isnan(pull(a, b, [a]).ratio.item())  # detection does not depend on it
    assert math.isnan(pull(b, a, [a]).ratio.item())  # the distiller does not


@pytest.mark.parametrize(("period", "due"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_period(period: int, due: list[int]) -> None:
    assert [i for i in range(5) if ShareWatch(period).is_due(i)] == due


def test_the_first_steps_are_all_watched() -> None:
    watch = ShareWatch(200)
    for _ in range(FIRST):
        assert watch.is_new("x")
        watch.hear("x", 1.0)
    assert not watch.is_new("x") and watch.is_new("y")
    assert not ShareWatch(0).is_new("x")


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_what_could_not_be_measured_counts_as_a_step(share: float) -> None:
    """
    It is one process's own; whether a step is measured must be the same in all.

    Measuring runs the backward pass of what lies behind the captures, SyncBN's exchange included.
    """
    watch = ShareWatch(200)
    for _ in range(FIRST):
        assert watch.is_new("x")
        watch.hear("x", share)
    assert not watch.is_new("x")


def messages_of(values: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    watch = ShareWatch(1)
    with caplog.at_level(logging.WARNING):
        for value in values:
            watch.hear("x", value)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("value", "advice"), [(0.005, "raise its WEIGHT"), (3.1, "lower its WEIGHT")]
)
def test_warns_at_once_at_the_start(
    value: float, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = messages_of([1.0, value, value], caplog)
    assert message.startswith("x: the gradient of its loss")
    assert advice in message and "troubleshooting" in message


def test_warns_once_when_a_share_stays_extreme_later(caplog: pytest.LogCaptureFixture) -> None:
    start = [1.0] * FIRST
    assert messages_of([*start, 9.0, 9.0, 1.0] * 3, caplog) == []
    assert len(messages_of([*start, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], caplog)) == 1


def test_what_was_not_measured_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = messages_of([math.nan, math.inf, 5.0], caplog)
    assert "is 5 times" in message


def test_zero_is_extreme_only_if_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    """A batch without objects has no gradient of losses of objects."""
    assert messages_of([0.0, 1.0, 0.0, 0.0, 1.0], caplog) == []
    (message,) = messages_of([0.0, 0.0, 0.0], caplog)
    assert "raise its WEIGHT" in message


@pytest.mark.parametrize(
    ("wanted", "values", "warns"),
    [(0.3, [0.3, 0.001], False), (0.3, [3.1], True), (3.0, [8.9], False), (3.0, [9.1], True)],
)
def test_a_share_that_was_asked_for_is_not_extreme(
    wanted: float, values: list[float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = ShareWatch(1)
    with caplog.at_level(logging.WARNING):
        for value in values:
            watch.hear("x", value, wanted=wanted)
    assert [f"lower its SHARE, {wanted:g}" in r.getMessage() for r in caplog.records] == (
        [True] if warns else []
    )


@pytest.mark.parametrize(
    ("wanted", "max_iter", "period"),
    [(200, 90000, 200), (200, 1500, 30), (200, 100, 20), (10, 100, 10), (0, 100, 0)],
)
def test_short_runs_are_measured_more_often(wanted: int, max_iter: int, period: int) -> None:
    assert measuring_period(wanted, max_iter) == period


def test_is_what_the_models_gradients_say(
    tiny_student: Callable[..., CfgNode],
    tiny_teacher: Callable[[str], TinyTeacher],
    tiny_records: list[dict[str, Any]],
) -> None:
    """Measured in a real step, against two separate backward passes to the pyramid."""
    cfg = tiny_student("fcos", tiny_teacher("fcos"), {"KD.GRAD_SHARE_PERIOD": 5})
    model = build_model(cfg)
    maps: list[dict[str, torch.Tensor]] = []
    model.student.backbone.register_forward_hook(lambda m, a, o: maps.append(o))
    losses, storage = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 10)
    features = list(maps[-1].values())
    distilled = losses.pop("loss_kd_feature_lp")
    norms = [
        math.sqrt(
            sum(
                g.square().sum().item() for g in torch.autograd.grad(x, features, retain_graph=True)
            )
        )
        for x in (distilled, sum(losses.values()))
    ]
    logged = storage.history("kd/feature_lp/grad_share").latest()
    assert logged == pytest.approx(norms[0] / norms[1], rel=1e-4)
    # Writers give what was measured, no median over the last 20 measurements.
    for quantity in ("grad_share", "cosine", "weight"):
        key = f"kd/feature_lp/{quantity}"
        storage.put_scalar(key, -5.0, smoothing_hint=False)
        assert storage.latest_with_smoothing_hint(20)[key][0] == -5.0

    for _ in range(FIRST):
        model.share_watch.hear("feature_lp", 1.0)
    _, storage = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 11)
    assert "kd/feature_lp/grad_share" not in storage.histories()
