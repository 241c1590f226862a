"""RepPoints: from points to boxes, and both assignments against loops and by hand."""

import math

import pytest
import torch
from torch import Tensor

from kd_det.functional.reppoints import (
    IGNORED,
    assign_by_overlap,
    assign_nearest,
    points_to_boxes,
    scaled_gradient,
)

POINTS = torch.tensor(
    [0.5, -1, -1.5, 0, 0, 2, 1, 1, -0.5, 0.5, 2, -0.5, 0, 0, -1, 1.5, 1.5, 3], dtype=torch.float64
)


def grid(side: int, strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Positions (R, 2) and their strides (R,) of an image of this side."""
    places = [
        (x * s, y * s, s) for s in strides for y in range(side // s) for x in range(side // s)
    ]
    table = torch.tensor(places, dtype=torch.float32)
    return table[:, :2], table[:, 2]


def test_moments_by_hand() -> None:
    box = points_to_boxes(POINTS, "moment", torch.zeros(2))
    expected = torch.tensor([-0.555254, -0.926449, 1.999698, 1.370893]).double()
    torch.testing.assert_close(box, expected, atol=1e-6, rtol=0)
    spread = torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True)
    box = points_to_boxes(POINTS, "moment", scaled_gradient(spread, 0.01))
    expected = torch.tensor([-0.689607, -0.718230, 2.134051, 1.162674]).double()
    torch.testing.assert_close(box, expected, atol=1e-6, rtol=0)
    box[2].backward()
    assert spread.grad is not None
    assert spread.grad.tolist() == pytest.approx([0.01 * 1.277476 * math.exp(0.1), 0], abs=1e-6)


def test_smallest_boxes_around_the_points() -> None:
    assert points_to_boxes(POINTS, "minmax").tolist() == [-1, -1.5, 3, 2]
    assert points_to_boxes(POINTS, "partial_minmax").tolist() == [-1, -1.5, 2, 1]


def test_equal_points_have_a_gradient() -> None:
    points = torch.full((1, 18), 0.5, requires_grad=True)
    points_to_boxes(points, "moment", torch.zeros(2)).sum().backward()
    assert points.grad is not None and points.grad.isfinite().all() and points.grad.any()


def test_nearest_by_hand() -> None:
    positions, strides = grid(128, (8, 16))
    boxes = [[10, 12, 42, 40], [16, 8, 34, 44], [0, 0, 100, 90], [49.5, 50, 54, 53]]
    boxes = torch.tensor([*boxes, [51, 49, 55, 54]])
    matched = assign_nearest(positions, strides, boxes, 4.0)
    found = {
        (*positions[i].tolist(), strides[i].item()): matched[i].item()
        for i in (matched >= 0).nonzero()[:, 0]
    }
    # Box 0 loses its position to box 1, and gets no other.
    expected = {(24, 24, 8): 1, (48, 48, 8): 3, (56, 48, 8): 4, (48, 48, 16): 2}
    assert found == expected


def nearest_with_loops(positions: Tensor, strides: Tensor, boxes: Tensor) -> list[int]:
    taken: dict[int, tuple[float, int]] = {}
    levels = strides.log2().tolist()
    for g, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        w, h = x2 - x1, y2 - y1
        level = math.trunc((math.log2(w / 4) + math.log2(h / 4)) / 2)
        level = min(max(level, round(min(levels))), round(max(levels)))
        best = (math.inf, -1)
        for j, (x, y) in enumerate(positions.double().tolist()):
            if levels[j] == level:
                away = math.hypot((x - (x1 + x2) / 2) / w, (y - (y1 + y2) / 2) / h)
                best = min(best, (away, j))
        away, j = best
        if j not in taken or away < taken[j][0]:
            taken[j] = (away, g)
    return [taken[j][1] if j in taken else -1 for j in range(len(positions))]


def random_boxes(count: int, seed: int, smallest: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 80
    sides = smallest + torch.rand(count, 2, generator=generator).square() * 90
    return torch.cat([corners, corners + sides], dim=1)


@pytest.mark.parametrize("seed", range(4))
def test_nearest_against_loops(seed: int) -> None:
    positions, strides = grid(96, (8, 16, 32))
    boxes = random_boxes(40, seed)
    expected = nearest_with_loops(positions, strides, boxes)
    assert 10 < sum(g >= 0 for g in expected) < 40, "some must lose"
    assert assign_nearest(positions, strides, boxes, 4.0).tolist() == expected


def test_ties_go_to_the_lower_position_and_the_lower_box() -> None:
    positions, strides = grid(32, (8,))
    between = torch.tensor([[8.0, 8, 16, 16]] * 2)  # as far from (8, 8) as from three others
    matched = assign_nearest(positions, strides, between, 4.0)
    assert (matched >= 0).nonzero()[:, 0].tolist() == [5] and matched[5] == 0


def test_an_object_between_the_levels_and_one_without_size() -> None:
    positions, strides = grid(64, (8, 32))
    # Of level 4, which there is not: 3 and 5 are as near, and the nearest position counts.
    middle = torch.tensor([[0.0, 0, 64, 64]])
    matched = assign_nearest(positions, strides, middle, 4.0)
    assert (matched >= 0).sum() == 1 and strides[matched.argmax()] == 8
    point = torch.tensor([[17.0, 17, 17, 17]])
    matched = assign_nearest(positions, strides, point, 4.0)
    assert positions[matched.argmax()].tolist() == [16, 16] and (matched >= 0).sum() == 1


def test_overlaps_by_hand() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 14], [20, 20, 30, 30], [40, 40, 50, 50], [0, 4, 10, 14]]
    objects = torch.tensor([[0.0, 0, 10, 12], [21, 21, 40, 40], [80, 80, 82, 82]])
    matched = assign_by_overlap(torch.tensor(boxes).float(), objects, 0.4, 0.5)
    assert matched.tolist() == [0, 0, 1, -1, 0]
    # A later object takes its best position from an earlier one, which is left without.
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 30, 40, 40]])
    objects = torch.tensor([[0, 0, 10, 10.5], [0, 0, 10, 14]])
    assert assign_by_overlap(boxes, objects, 0.4, 0.5).tolist() == [1, -1]


def overlaps_with_loops(boxes: Tensor, objects: Tensor, low: float, high: float) -> list[int]:
    def iou(a: list[float], b: list[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        common = max(width, 0) * max(height, 0)
        return common / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - common)

    table = [[iou(a, b) for b in objects.tolist()] for a in boxes.tolist()]
    matched = []
    for row in table:
        best = max(row)
        matched.append(row.index(best) if best >= high else -1 if best < low else IGNORED)
    for g in range(len(objects)):
        top = max(row[g] for row in table)
        for j, row in enumerate(table):
            if top > 0 and row[g] == top:
                matched[j] = g
    return matched


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thresholds", [(0.4, 0.5), (0.0, 0.3)])
def test_overlaps_against_loops(seed: int, thresholds: tuple[float, float]) -> None:
    # Whole numbers: the same overlaps in float32 and in Python's.
    boxes, objects = (random_boxes(n, seed, 8.0).round() for n in (300, 25))
    boxes[250:] = boxes[:50]  # some are equally good
    expected = overlaps_with_loops(boxes, objects, *thresholds)
    assert len(set(expected)) > 10
    assert assign_by_overlap(boxes, objects, *thresholds).tolist() == expected


def test_without_objects_all_is_background() -> None:
    positions, strides = grid(32, (8,))
    none = torch.zeros(0, 4)
    assert assign_nearest(positions, strides, none, 4.0).tolist() == [-1] * 16
    assert assign_by_overlap(random_boxes(5, 0), none, 0.4, 0.5).tolist() == [-1] * 5
