"""BCKD on paired predictions; `functional.bckd` has tests of its own."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene
from waves import wave

from kd_det.distillers import BCKD, PredictionPair, Step, Targets
from kd_det.distillers.predictions import LevelPredictions
from kd_det.functional.level_grid import Grid

OWN = [(0, 0, 10, 10), (4, 3, 20, 14), (8, 8, 24, 40), (1, 1, 3, 9)]
OTHER = [(0, 0, 10, 10), (6, 2, 22, 16), (30, 8, 40, 40), (2, 0, 5, 8)]
LOGITS = wave((4, 3), 2, 0.9, 0.2), wave((4, 3), 3, 0.7, 1.1)


class TestBCKD(DistillerContract):
    name = "BCKD"
    parts_of_mean = ()
    other: ClassVar[dict[str, Any]] = {
        "HEAD": "dense_head",
        "CLS_WEIGHT": 2.0,
        "LOC_WEIGHT": 1.0,
        "BETA": 2.0,
        "BOX": "iou",
        "MASK_PADDING": False,
    }

    def test_gradcheck(self, scene: Scene) -> None:
        """Gradient of the boxes does not pass through what weighs them."""
        self.check_gradient(scene, ("logits", "offsets"), ("cls",))
        self.check_gradient(scene, ("offsets",), ("loc",))

    def test_a_batch_is_the_sum_of_its_images_at_one_normaliser(self, scene: Scene) -> None:
        whole = self.losses(scene)
        single = [self.losses(scene.image(i)) for i in range(2)]
        for part in ("cls", "loc"):
            torch.testing.assert_close(whole[part], single[0][part] + single[1][part])

    def test_without_a_normaliser_the_teachers_scores_give_one(self, scene: Scene) -> None:
        """The sum of its highest probabilities on the images, whatever the mask of the loss."""
        pairs = scene.step().predictions["predictions"]
        total = sum(
            (pair.teacher.logits.sigmoid().amax(-1) * pair.valid()).sum().item() for pair in pairs
        )
        assert total > 1
        bare = dataclasses.replace(scene, normalizer=None)
        torch.testing.assert_close(self.total(bare) * total, self.total(scene) * 3.0)
        small = dataclasses.replace(scene, normalizer=0.2)
        torch.testing.assert_close(self.total(small), self.total(scene) * 3.0)


class TestIoU(TestBCKD):
    options: ClassVar[dict[str, Any]] = {"box": "iou", "beta": 2.0}


def step(width: float = 32.0) -> Step:
    sizes = torch.tensor([[8.0, width]])
    own, other = (torch.tensor([x], dtype=torch.float64) for x in (OWN, OTHER))
    pair = PredictionPair(
        "stride 8",
        Grid(1, 4, 8.0),
        LevelPredictions(LOGITS[0][None], own, None),
        LevelPredictions(LOGITS[1][None], other, None),
        None,
        sizes,
    )
    targets = Targets([], [], [(8, int(width))], [])
    return Step({}, {}, targets, predictions={"predictions": [pair]}, loss_normalizer=2.0)


@pytest.mark.parametrize(
    ("options", "cls", "loc"),
    [
        ({}, 0.877815546, 0.486928198),
        ({"box": "iou"}, 0.877815546, 0.430263472),
        ({"beta": 2.0}, 0.379251422, 0.486928198),
    ],
)
def test_vectors(options: dict[str, Any], cls: float, loc: float) -> None:
    found = BCKD(**options)(step())
    assert found["cls"].item() == pytest.approx(cls, abs=1e-9)
    assert found["loc"].item() == pytest.approx(4 * loc, abs=4e-9)


def test_positions_on_padding_do_not_count() -> None:
    """An image of three cells: the fourth, whose boxes differ most, is padding."""
    masked, unmasked = BCKD()(step(24.0)), BCKD(mask_padding=False)(step(24.0))
    assert unmasked["cls"].item() == pytest.approx(0.877815546, abs=1e-9)
    gap = 0.629875433 * (1 - 0.128787879) / 2
    assert masked["loc"].item() == pytest.approx(4 * (0.486928198 - gap), abs=1e-8)
