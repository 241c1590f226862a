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
from detectron2.utils.events import EventStorage
from tiny_runs import TinyTeacher

from kd_det.distillation.gradient_share import GradientShare


def measured(
    share: GradientShare, detection: Any, distilled: Any, features: Any
) -> tuple[dict[str, float], EventStorage]:
    with EventStorage() as storage:
        return share.measure(detection, distilled, features), storage


def test_hand_computed() -> None:
    """d(3a + 4b)/d(a, b) = (3, 4), norm 5; d(det) sums to (6, 8), norm 10: a share of one half."""
    a, b = (torch.ones((), requires_grad=True) for _ in range(2))
    detection = {"cls": 6 * a, "box": 8 * b}
    share, storage = measured(
        GradientShare(1), detection, {"x": 3 * a + 4 * b, "y": 3 * a}, {"x": [a, b], "y": [a]}
    )
    assert share == {"x": pytest.approx(0.5), "y": pytest.approx(0.5)}
    assert storage.history("kd/x/grad_share").latest() == pytest.approx(0.5)


def test_leaves_the_graph_and_the_gradients_alone() -> None:
    weight = torch.ones(2, requires_grad=True)
    feature = 2 * weight
    detection, loss = {"cls": feature.sum()}, feature.square().sum()
    measured(GradientShare(1), detection, {"x": loss}, {"x": [feature]})
    assert weight.grad is None
    (detection["cls"] + loss).backward()
    assert torch.equal(weight.grad, torch.full((2,), 2.0 + 8.0))  # type: ignore[arg-type]


def test_small_float16_gradients_do_not_vanish() -> None:
    """5e-8 is less than the smallest float16 number; its share of 1e-5 is 5e-3."""
    feature = torch.ones(1, dtype=torch.float16, requires_grad=True)
    wide = feature.float()
    detection, distilled = {"cls": (wide * 1e-5).sum()}, {"x": (wide * 5e-8).sum()}
    share, _ = measured(GradientShare(1), detection, distilled, {"x": [feature]})
    assert share["x"] == pytest.approx(5e-3, rel=0.05)


def test_features_outside_the_graph_are_left_out() -> None:
    a = torch.ones((), requires_grad=True)
    frozen = torch.ones(())
    share, _ = measured(
        GradientShare(1), {"cls": a}, {"x": 2 * a, "y": 2 * frozen}, {"x": [a, frozen], "y": [a]}
    )
    assert share == {"x": pytest.approx(2.0)}


@pytest.mark.parametrize(("period", "due"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_period(period: int, due: list[int]) -> None:
    assert [i for i in range(5) if GradientShare(period).is_due(i)] == due


def run_of_shares(values: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    share = GradientShare(1)
    feature = torch.ones((), requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for value in values:
            measured(share, {"cls": 1 * feature}, {"x": value * feature}, {"x": [feature]})
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("value", "advice"), [(0.005, "raise its WEIGHT"), (11.0, "lower its WEIGHT")]
)
def test_warns_once_when_a_share_stays_extreme(
    value: float, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages = run_of_shares([value] * 3 + [1.0] + [value] * 9, caplog)
    assert len(messages) == 1
    assert messages[0].startswith("x: ")
    assert advice in messages[0]


@pytest.mark.parametrize("values", [[0.02] * 9, [9.0] * 9, [0.001, 0.001, 1.0] * 3])
def test_does_not_warn_of_shares_that_are_or_come_back_in_range(
    values: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_of_shares(values, caplog) == []


def test_no_gradient_at_all_is_a_share_of_zero_not_an_error() -> None:
    a = torch.ones((), requires_grad=True)
    share, _ = measured(GradientShare(1), {"cls": a}, {"x": a * 0}, {"x": [a]})
    assert share == {"x": 0.0}


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

    _, storage = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 11)
    assert "kd/feature_lp/grad_share" not in storage.histories()
