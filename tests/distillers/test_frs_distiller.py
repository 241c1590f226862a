"""FRS on paired levels; `functional.frs` has tests of its own."""

from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract
from waves import SIZES, standard_pair, wave

from kd_det.distillers import FRS, LevelShape, Pair, Step, Targets, TeacherMap

SCORES = wave((2, 4, 4, 5), 2, 0.21, 1) - 1, wave((2, 4, 4, 5), 3, 0.37, 0) - 1


class TestFRS(DistillerContract):
    name = "FRS"
    # Losses of the size that the contract's thresholds are for.
    options: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 1.0}
    parts_of_mean = ("feat", "head")
    other: ClassVar[dict[str, Any]] = {
        "ALPHA": 0.1,
        "BETA": 0.0,
        "SCORES_CAPTURE": "head.scores",
        "SCOPE": "batch",
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "auto",
    }


class TestFeaturesAlone(TestFRS):
    options: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 0.0}
    parts_of_mean = ("feat",)


class TestScopeBatch(TestFRS):
    options: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 1.0, "scope": "batch"}
    parts_of_mean = ()


@pytest.mark.parametrize(
    ("options", "features", "head"),
    [
        ({}, 3.564678387, 2.021941983),
        ({"scope": "batch"}, 3.564829380, 2.021947480),
        ({"mask_padding": True}, 3.191933904, 2.005278751),
    ],
)
def test_vectors(options: dict[str, Any], features: float, head: float) -> None:
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    pairs = {
        "features": [Pair("p3~p3", 8.0, *standard_pair(), sizes)],
        "scores": [Pair("p3~p3", 8.0, *SCORES, sizes)],
    }
    step = Step(
        pairs,
        {},
        Targets([], [], list(SIZES), []),
        maps={"richness": [TeacherMap(8.0, SCORES[1])]},
    )
    found = FRS(alpha=1.0, beta=1.0, **options)(step)
    assert found["feat"].item() == pytest.approx(features, abs=1e-8)
    assert found["head"].item() == pytest.approx(head, abs=1e-8)


def test_without_head_loss_classes_may_differ() -> None:
    assert FRS().uses_class_scores
    objectness = "proposal_generator.rpn_head.objectness_logits"
    assert not FRS(scores_capture=objectness).uses_class_scores
    alone = FRS(beta=0.0)
    assert not alone.uses_class_scores
    assert [spec.student for spec in alone.captures()] == ["backbone", None]


def test_adapters_are_three_by_three_with_bias() -> None:
    distiller = FRS()
    assert (distiller.adapter, distiller.adapter_kernel, distiller.adapter_bias) == (
        "always",
        3,
        True,
    )


def test_features_without_scores_are_refused() -> None:
    levels = {
        "features": [LevelShape("p2~p2", 4.0, 8), LevelShape("p3~p3", 8.0, 8)],
        "richness": [LevelShape("p3", 8.0, 8)],
    }
    with pytest.raises(ValueError, match=r"p2~p2 have stride 4.*strides 8 only; set KD.FRS.SCORES"):
        FRS().build(levels, {})
