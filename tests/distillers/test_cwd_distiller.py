"""CWD on paired levels and on class logits; `functional.cwd` has tests of its own."""

from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene
from waves import SIZES, standard_pair

from kd_det.distillers import CWD, Pair, Step, Targets
from kd_det.functional.cwd import channel_divergence
from kd_det.functional.distance import masked_standardize


class TestCWD(DistillerContract):
    name = "CWD"
    other: ClassVar[dict[str, Any]] = {
        "FEATURES": "logits",
        "LOGITS_CAPTURE": "head.scores",
        "TAU": 4.0,
        "NORMALIZE": True,
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "always",
    }
    along: ClassVar[dict[str, dict[str, Any]]] = {"LOGITS_CAPTURE": {"FEATURES": "logits"}}

    def test_is_the_sum_over_levels_of_the_functional_form(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        expected = sum(channel_divergence(p.student, p.teacher) for p in pairs)
        torch.testing.assert_close(self.losses(scene), {"": expected})


class TestNormalized(TestCWD):
    options: ClassVar[dict[str, Any]] = {"normalize": True}

    def test_is_the_sum_over_levels_of_the_functional_form(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        expected = sum(
            channel_divergence(masked_standardize(p.student), masked_standardize(p.teacher))
            for p in pairs
        )
        torch.testing.assert_close(self.losses(scene), {"": expected})


class TestLogits(TestCWD):
    options: ClassVar[dict[str, Any]] = {"features": "logits", "tau": 4.0}
    test_is_the_sum_over_levels_of_the_functional_form = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.258132020),
        ({"tau": 4.0}, 0.295836951),
        ({"mask_padding": True}, 0.235870825),
    ],
)
def test_vectors(options: dict[str, Any], expected: float) -> None:
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    pairs = {"features": [Pair("p3~p3", 8.0, *standard_pair(), sizes)]}
    loss = CWD(**options)(Step(pairs, {}, Targets([], [], list(SIZES), [])))[""]
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_class_logits_are_compared_as_they_are() -> None:
    neck, logits = CWD(), CWD(features="logits", adapter="always")
    assert not neck.uses_class_scores
    assert logits.uses_class_scores
    assert (logits.spec.student, logits.spec.adapter) == ("head.cls_score", "never")
    with pytest.raises(ValueError, match=r"KD.CWD.FEATURES is 'head', expected 'neck' or 'logits'"):
        CWD(features="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"KD.CWD.TAU is 0"):
        CWD(tau=0)
