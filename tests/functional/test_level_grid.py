import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional._importance.runs import runs_of_boxes, runs_of_everything
from kd_det.functional.level_grid import (
    Grid,
    cells_on_images,
    count_positions,
    grid_positions,
    positions_in_boxes,
    positions_in_images,
    same_stride,
    split_levels,
)

LEVELS = (Grid(5, 7, 8), Grid(3, 4, 16), Grid(1, 1, 64, offset=0.0))


def inside(point: Tensor, box: Tensor) -> bool:
    (x, y), (x0, y0, x1, y1) = point.tolist(), box.tolist()
    return min(x - x0, y - y0, x1 - x, y1 - y) > 1e-10


def test_positions_stand_row_by_row_at_offset():
    points = grid_positions((Grid(2, 3, 8), Grid(1, 1, 32, offset=0.0)))
    expected = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [0, 0]]
    assert points.tolist() == expected
    assert count_positions(LEVELS) == len(grid_positions(LEVELS)) == 35 + 12 + 1


def test_split_levels_restores_the_grids():
    values = torch.arange(2 * 48).view(2, 48)
    first, second, third = split_levels(values, LEVELS)
    assert (first.shape, second.shape, third.shape) == ((2, 5, 7), (2, 3, 4), (2, 1, 1))
    assert second[1, 0, 0] == 48 + 35
    with pytest.raises(RuntimeError):
        split_levels(values[:, 1:], LEVELS)


def test_a_position_on_the_edge_of_a_box_is_outside():
    level = (Grid(2, 2, 8),)
    boxes = torch.tensor([[[4.0, 0.0, 12.5, 16.0]]])
    valid = torch.tensor([[True]])
    assert positions_in_boxes(level, boxes, valid).tolist() == [[False, True, False, True]]


def test_positions_on_padding():
    marks = positions_in_images((Grid(2, 3, 8),), [(16, 24), (5, 12)])
    assert marks.tolist() == [[True] * 6, [True, False, False, False, False, False]]


def test_cells_count_by_their_centre_or_by_any_part():
    """Of an image 4 x 17 in cells of 8: its right edge is one pixel into the third column."""
    sizes = torch.tensor([[4, 17], [5, 24], [0, 0]])
    by_centre = cells_on_images(Grid(1, 4, 8), sizes)
    assert by_centre.squeeze(1).sum(1).tolist() == [0, 3, 0]
    by_part = cells_on_images(Grid(1, 4, 8, offset=0.0), sizes)
    assert by_part.squeeze(1).tolist() == [[True, True, True, False]] * 2 + [[False] * 4]
    # A centre on the edge is outside, a cell that begins there too.
    assert cells_on_images(Grid(1, 3, 8), torch.tensor([[8.0, 12.0]])).sum() == 1
    assert cells_on_images(Grid(1, 3, 8, offset=0.0), torch.tensor([[8.0, 16.0]])).sum() == 2


def test_strides_measured_from_rounded_sizes_are_the_same():
    assert same_stride(8.0, 800 / 101) and same_stride(800 / 101, 8.0)
    assert same_stride(8, 8.15) and not same_stride(8, 8.17)
    assert not same_stride(8, 16) and not same_stride(16, 12)


coordinate = st.integers(-2, 18).map(lambda step: step * 4.0)  # often exactly on a position
box_strategy = st.tuples(coordinate, coordinate, coordinate, coordinate)


@settings(deadline=None, max_examples=40)
@given(st.lists(box_strategy, max_size=4))
def test_runs_and_marks_agree_with_testing_every_position(corners):
    boxes = torch.tensor(corners).reshape(-1, 4)
    points = grid_positions(LEVELS)
    expected = [
        (owner, position)
        for owner, box in enumerate(boxes)
        for position, point in enumerate(points)
        if inside(point, box)
    ]
    runs = runs_of_boxes(LEVELS, boxes)
    owner, position = runs.pairs(int(runs.length.sum()))
    assert list(zip(owner.tolist(), position.tolist(), strict=True)) == expected
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    marks = positions_in_boxes(LEVELS, boxes[None], valid)
    assert marks.nonzero()[:, 1].tolist() == sorted({position for _, position in expected})


def test_broken_boxes_hold_nothing():
    nan = float("nan")
    boxes = torch.tensor([[nan, 0, 50, 50], [30, 30, 10, 50], [0, nan, nan, 9]])
    assert len(runs_of_boxes(LEVELS, boxes).owner) == 0


def test_runs_of_everything_hold_all_positions():
    owner, position = runs_of_everything(LEVELS, 2).pairs(96)
    assert owner.tolist() == [0] * 48 + [1] * 48
    assert position.tolist() == list(range(48)) * 2


def test_padding_boxes_cover_nothing():
    boxes = torch.tensor([[[0.0, 0.0, 99.0, 99.0]], [[0.0, 0.0, 99.0, 99.0]]])
    marks = positions_in_boxes(LEVELS[:1], boxes, torch.tensor([[True], [False]]))
    assert marks[0].all() and not marks[1].any()
