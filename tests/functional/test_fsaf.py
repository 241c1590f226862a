"""FSAF's regions and choice of levels: the description's numbers, hand-computed cases."""

import pytest
import torch
from torch import Tensor

from kd_det.functional.fsaf import Labels, Pairs, find_pairs, ignore, label_pairs, select_levels

# Two levels of strides 8 and 16, grids of 4 x 4 and 2 x 2: positions 0 .. 19.
POINTS = torch.tensor(
    [[8.0 * c, 8.0 * r] for r in range(4) for c in range(4)]
    + [[16.0 * c, 16.0 * r] for r in range(2) for c in range(2)]
)
STRIDES = torch.tensor([8.0] * 16 + [16.0] * 4)
SPEC = torch.tensor([[2.3, 3.1, 23.9, 17.7], [9.2, 6.4, 30.6, 30.2]])
NESTED = torch.tensor([[2.0, 2, 30, 30], [6.0, 6, 24, 22]])


def label(
    boxes: Tensor, classes: list[int], core: float, ignored: float, dominates: bool = False
) -> tuple[Pairs, Labels]:
    pairs = find_pairs(POINTS, STRIDES, boxes, core=core, ignore=ignored)
    own = torch.tensor(classes, dtype=torch.int64)[pairs.box]
    labels = label_pairs(
        pairs, pairs.position, boxes, own, torch.zeros(20, 2), foreground_dominates=dominates
    )
    return pairs, labels


def positives(pairs: Pairs, labels: Labels) -> list[list[int]]:
    return [pairs.position[labels.positive & (pairs.box == g)].tolist() for g in range(2)]


def ignored(labels: Labels) -> list[tuple[int, ...]]:
    return [tuple(found) for found in (labels.weights == 0).nonzero().tolist()]


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.2, [(19, 0)]), (0.5, [(9, 1), (10, 1), (17, 1), (19, 0)])]
)
def test_regions_of_the_description(margin: float, expected: list[tuple[int, int]]) -> None:
    pairs, labels = label(SPEC, [1, 0], 0.2, margin)
    assert positives(pairs, labels) == [[5, 6, 19], [10, 11, 14, 15]]
    assert ignored(labels) == expected


def test_a_smaller_box_takes_positions_and_the_other_is_ignored_there() -> None:
    pairs, labels = label(NESTED, [1, 0], 0.5, 0.5)
    assert positives(pairs, labels) == [[7, 11, 13, 14, 15], [5, 6, 9, 10, 19]]
    assert ignored(labels) == [(j, 1) for j in (5, 6, 9, 10, 19)]


def test_of_one_class_neither_has_the_common_positions() -> None:
    pairs, labels = label(NESTED, [1, 1], 0.5, 0.5)
    assert positives(pairs, labels) == [[7, 11, 13, 14, 15], []]
    assert ignored(labels) == [(j, 1) for j in (5, 6, 9, 10, 19)]


def test_foreground_dominates() -> None:
    pairs, labels = label(NESTED, [1, 1], 0.5, 0.5, dominates=True)
    assert positives(pairs, labels) == [[7, 11, 13, 14, 15], [5, 6, 9, 10, 19]]
    assert ignored(labels) == []


def test_of_equal_boxes_the_first_takes_the_positions() -> None:
    pairs, labels = label(SPEC[[0, 0]], [1, 0], 0.2, 0.2)
    assert positives(pairs, labels) == [[5, 6, 19], []]
    assert ignored(labels) == [(j, 0) for j in (5, 6, 19)]


def test_a_core_covers_more_than_a_hundredth_of_a_cell() -> None:
    # Cells of stride 16, 256 square pixels. The fifth of 8 x 8 is 1.6 x 1.6 = 2.56, a hundredth;
    # of 8.1 x 8.1 a little more.
    for side, expected in ((8.0, []), (8.1, [19])):
        box = torch.tensor([[16 - side / 2, 16 - side / 2, 16 + side / 2, 16 + side / 2]])
        pairs = find_pairs(POINTS[16:], STRIDES[16:], box)
        assert [j + 16 for j in pairs.position[pairs.core].tolist()] == expected


def test_a_core_holds_its_position() -> None:
    # The fifth of the box, [6.8, 6.8, 7.2, 7.2], lies in the cell of (8, 8), the box does not.
    pairs = find_pairs(POINTS, STRIDES, torch.tensor([[6.0, 6, 8, 8]]), min_cover=0.0)
    assert 5 in pairs.position.tolist() and not pairs.core.any()


def test_the_smallest_mean_loss_chooses_the_level() -> None:
    # Box 0: (1 + 3) / 2 on the first level, 1.5 on the second. Box 1: the second alone; what is not
    # positive has no say. Box 2: a tie.
    box = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    level = torch.tensor([0, 0, 1, 0, 1, 0, 1])
    loss = torch.tensor([1.0, 3, 1.5, 0.1, 9, 2, 2])
    positive = torch.tensor([True, True, True, False, True, True, True])
    kept = select_levels(loss, positive, box, level, (3, 2))
    assert kept.tolist() == [False, False, True, False, True, True, False]


def test_ignoring_more() -> None:
    weights = torch.tensor([[1.0, 0], [1, 1]])
    row, classes = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    chosen = torch.tensor([False, True, False])
    assert ignore(weights, row, classes, chosen).tolist() == [[1, 0], [0, 1]]
    assert weights.tolist() == [[1, 0], [1, 1]]


def test_no_boxes() -> None:
    pairs, labels = label(torch.zeros(0, 4), [], 0.2, 0.5)
    assert len(pairs.box) == 0 and (labels.weights == 1).all()
    nothing = select_levels(torch.zeros(0), labels.positive, pairs.box, pairs.box, (0, 3))
    assert nothing.tolist() == []
