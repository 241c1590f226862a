"""FGD on paired levels; `functional.fgd` has tests of its own."""

from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene
from waves import wave

from kd_det.distillers import FGD, LevelShape, Pair, Step, Targets

S, T = wave((2, 4, 4, 6), 1, 0.1, 0), wave((2, 4, 4, 6), 1.2, 0.17, 0.3)
BOXES = [torch.tensor([[4.0, 4, 20, 12], [10, 8, 40, 30]]), torch.zeros(0, 4)]


class TestFGD(DistillerContract):
    name = "FGD"
    # Losses of the size that the contract's thresholds are for.
    options: ClassVar[dict[str, Any]] = {
        "alpha": 1.0,
        "beta": 1.0,
        "gamma": 1.0,
        "lambda_global": 0.1,
    }
    parts_of_mean = ("fg", "bg", "attention", "global")
    other: ClassVar[dict[str, Any]] = {
        "LEVELS": 3,
        "ALPHA": 0.1,
        "BETA": 0.2,
        "GAMMA": 0.3,
        "LAMBDA_GLOBAL": 0.4,
        "TAU": 0.8,
        "MASK_PADDING": False,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "never",
    }

    def test_a_batch_is_the_mean_of_its_images(self, scene: Scene) -> None:
        """An image's loss in a batch is half of that alone, of an image with a box as well."""
        super().test_a_batch_is_the_mean_of_its_images(scene)


def losses(boxes: list[torch.Tensor], **options: Any) -> dict[str, float]:
    distiller = FGD(**options)
    distiller.build({"features": [LevelShape("p3~p3", 8.0, 4)]}, {})
    distiller.double()
    pair = Pair("p3~p3", 8.0, S, T, torch.tensor([[32.0, 48.0]] * 2))
    step = Step({"features": [pair]}, {}, Targets(boxes, [], [(32, 48)] * 2, []))
    return {part: value.item() for part, value in distiller(step).items()}


def test_vectors() -> None:
    found = losses(BOXES, alpha=1.0, beta=1.0, gamma=1.0, lambda_global=1.0)
    assert found["fg"] == pytest.approx(4.156987400, abs=5e-7)
    assert found["bg"] == pytest.approx(4.723170987, abs=5e-7)
    assert found["attention"] == pytest.approx(3.149191443, abs=5e-9)
    assert found["global"] == pytest.approx(112.745219073, abs=5e-7)
    # RetinaNet's weights.
    assert sum(losses(BOXES).values()) == pytest.approx(0.008656895, abs=1e-8)


def test_without_boxes_and_full_of_boxes() -> None:
    options = {"alpha": 1.0, "beta": 1.0}
    empty = losses([torch.zeros(0, 4)] * 2, **options)
    assert (empty["fg"], empty["bg"]) == (0, pytest.approx(4.740168861, abs=5e-7))
    full = losses([torch.tensor([[0.0, 0, 48, 32]])] * 2, **options)
    assert (full["fg"], full["bg"]) == (pytest.approx(4.740168861, abs=5e-7), 0)


def test_both_blocks_of_a_level_train() -> None:
    distiller = FGD()
    distiller.build({"features": [LevelShape("p3~p3", 8.0, 256)]}, {})
    assert sum(p.numel() for p in distiller.parameters()) == 132_866
