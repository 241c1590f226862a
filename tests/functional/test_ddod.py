"""Assignment by predictions: against loops over boxes, edge cases, and the weights of levels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_det.functional.ddod import assign_by_quality, level_factors, prediction_qualities

STRIDES = (8, 16, 32)
SIDE = 96
EXPONENT = 0.8


def square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


ANCHORS = [
    torch.tensor(
        [square(x * s, y * s, 8 * s) for y in range(SIDE // s) for x in range(SIDE // s)],
        dtype=torch.float32,
    )
    for s in STRIDES
]
R = sum(map(len, ANCHORS))


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + 6 + torch.rand(count, 2, generator=generator) * 50], 1)


def scene(seed: int, objects: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class logits and boxes of all positions, boxes somewhere near their own; objects."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, 3, generator=generator)
    centres = torch.cat(ANCHORS).unflatten(1, (2, 2)).mean(dim=1)
    sides = 10 + 40 * torch.rand(R, 2, generator=generator)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    classes = torch.randint(3, (objects,), generator=generator)
    return logits, boxes, random_boxes(objects, generator), classes


def quality_by_hand(logit: float, box: Any, target: Any, exponent: float) -> float:
    width = min(box[2], target[2]) - max(box[0], target[0])
    height = min(box[3], target[3]) - max(box[1], target[1])
    common = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, target)]
    iou = common / (sum(areas) - common)
    probability = 1 / (1 + math.exp(-logit))
    return 0.0 if iou == 0 else probability ** (1 - exponent) * iou**exponent


def assign_with_loops(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_classes: Tensor, assigner: str, k: int
) -> list[int]:
    """Box by box, in Python's numbers."""
    anchors = torch.cat(ANCHORS).double().numpy()
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    matched, highest = [-1] * R, [-1.0] * R
    for g, (box, label) in enumerate(zip(gt_boxes.tolist(), gt_classes.tolist(), strict=True)):
        q = [
            quality_by_hand(logits[j, label].item(), boxes[j].tolist(), box, EXPONENT)
            for j in range(R)
        ]
        middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        if assigner == "atss":
            chosen, start = [], 0
            for level in ANCHORS:
                ids = range(start, start + len(level))
                chosen += sorted(ids, key=lambda j: np.linalg.norm(centres[j] - middle))[:k]
                start += len(level)
            values = [q[j] for j in chosen]
            threshold = np.mean(values) + np.std(values, ddof=1)
        else:
            chosen, threshold = sorted(range(R), key=lambda j: -q[j])[:k], 1e-12
        for j in chosen:
            x, y = centres[j]
            sides = (x - box[0], y - box[1], box[2] - x, box[3] - y)
            if q[j] >= threshold and min(sides) > 0.01 and q[j] > highest[j]:
                matched[j], highest[j] = g, q[j]
    return matched


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("assigner", ["atss", "topk"])
def test_against_loops(assigner: Any, seed: int) -> None:
    logits, boxes, gt_boxes, gt_classes = scene(seed)
    (quality,) = prediction_qualities(logits, boxes, gt_boxes, gt_classes, (EXPONENT,))
    found = assign_by_quality(ANCHORS, gt_boxes, quality, assigner=assigner, topk=9)
    expected = assign_with_loops(logits, boxes, gt_boxes, gt_classes, assigner, 9)
    assert len(set(expected)) > 4, "the case must have positives"
    assert found.tolist() == expected


@pytest.mark.parametrize("assigner", ["atss", "topk"])
def test_without_objects_all_is_background(assigner: Any) -> None:
    logits, boxes, _, _ = scene(0)
    none, no_classes = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    (quality,) = prediction_qualities(logits, boxes, none, no_classes, (EXPONENT,))
    found = assign_by_quality(ANCHORS, none, quality, assigner=assigner, topk=9)
    assert found.tolist() == [-1] * R


@pytest.mark.parametrize(("assigner", "positives"), [("atss", 27), ("topk", 0)])
def test_an_object_that_no_prediction_meets(assigner: Any, positives: int) -> None:
    """ "atss": every candidate is as good as their mean; all lie inside. "topk": none."""
    box = torch.tensor([[-200.0, -200, 300, 300]])
    found = assign_by_quality(ANCHORS, box, torch.zeros(R, 1), assigner=assigner, topk=9)
    assert (found == 0).sum() == positives


@pytest.mark.parametrize("assigner", ["atss", "topk"])
@pytest.mark.parametrize(("edge", "positive"), [(7.985, True), (7.995, False)])
def test_a_centre_must_be_a_hundredth_of_a_pixel_inside(
    assigner: Any, edge: float, positive: bool
) -> None:
    box = torch.tensor([[edge, 0.0, 20, 20]])
    quality = torch.zeros(R, 1)
    quality[13] = 1.0  # the fine position at (8, 8)
    found = assign_by_quality(ANCHORS, box, quality, assigner=assigner, topk=9)
    assert (found[13] == 0) == positive


@pytest.mark.parametrize("assigner", ["atss", "topk"])
def test_equal_objects_go_to_the_first_and_fewer_positions_than_candidates(assigner: Any) -> None:
    anchors = [ANCHORS[0][[13]]]
    boxes = torch.tensor([[0.0, 0, 20, 20]] * 2)
    found = assign_by_quality(anchors, boxes, torch.ones(1, 2), assigner=assigner, topk=9)
    assert found.tolist() == [0]


def test_levels_weigh_by_what_they_have_had() -> None:
    counts = torch.tensor([6, 3, 1, 0, 0])
    expected = torch.tensor([1, 1.5, 11 / 6, 2, 2])
    torch.testing.assert_close(level_factors(counts), expected)
    counts += torch.tensor([0, 1, 9, 2, 0])
    torch.testing.assert_close(level_factors(counts), torch.tensor([1.4, 1.6, 1, 1.8, 2]))
    assert level_factors(torch.zeros(2, 5, dtype=torch.int64)).tolist() == [[2.0] * 5] * 2
    # Each assignment for itself; beyond what float32 counts.
    large = torch.tensor([[0, 1], [2**40, 2**40 + 1]])
    assert level_factors(large).tolist() == [[2.0, 1.0]] * 2
