"""Hand-computed weights e^(-d^2/2), and importance that follows from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional.gaussian_importance import (
    Gate,
    ImportanceOptions,
    gaussian_weights,
    importance_maps,
    prediction_quality,
)
from kd_det.functional.level_grid import (
    Grid,
    grid_positions,
    positions_in_boxes,
)
from kd_det.functional.pgd import mean_mask

COARSE = (Grid(4, 4, 8),)
COARSE_BOX = [2.0, 2.0, 30.0, 18.0]


def weights(points: list[tuple[float, float]], ridge: float = 0.0) -> Tensor:
    selected = torch.ones(len(points), dtype=torch.bool)
    return gaussian_weights(torch.tensor(points, dtype=torch.float32), selected, ridge)


def predictions(
    quality: dict[tuple[int, float, float], float], box: list[float], grids: tuple[Grid, ...]
) -> tuple[Tensor, Tensor]:
    """Logits of one class and boxes with p = IoU = quality at (stride, x, y); 0.01 elsewhere."""
    points = grid_positions(grids).tolist()
    strides = [grid.stride for grid in grids for _ in range(grid.height * grid.width)]
    q = [quality.get((stride, x, y), 0.01) for stride, (x, y) in zip(strides, points, strict=True)]
    q = torch.tensor(q, dtype=torch.float64)
    boxes = torch.tensor(box, dtype=torch.float64).repeat(len(q), 1)
    # A box of full height and the fraction q of the width overlaps by exactly q.
    boxes[:, 2] = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) * q
    return q.logit()[None, :, None], boxes[None]


def single_box_maps(
    quality: dict[tuple[int, float, float], float],
    box: list[float],
    grids: tuple[Grid, ...],
    gate: Gate = "before",
) -> Tensor:
    logits, boxes = predictions(quality, box, grids)
    maps = importance_maps(
        logits,
        boxes,
        gt_boxes=torch.tensor([[box]]),
        gt_classes=torch.zeros(1, 1, dtype=torch.int64),
        gt_valid=torch.ones(1, 1, dtype=torch.bool),
        grids=grids,
        options=ImportanceOptions(top_k=4, gate=gate, ridge=0.0),
    )
    torch.testing.assert_close(maps[0], maps[1])  # p = IoU: the exponent does not matter
    return maps[0][0]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 0), (8, 0), (0, 8), (8, 8)], [0.367879] * 4),
        ([(0, 0), (8, 0), (0, 8), (8, 8), (4, 4)], [0.286505] * 4 + [1.0]),
        ([(12, 12), (20, 12), (12, 4), (12, 20)], [0.846482, 0.223130, 0.311403, 0.311403]),
        ([(0, 0), (8, 0), (0, 8), (24, 24)], [0.695144, 0.335911, 0.335911, 0.233506]),
    ],
)
def test_weights_of_spread_points(points, expected):
    found = weights(points)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    assert -2 * found.log().sum() == pytest.approx(2 * len(points))


@pytest.mark.parametrize(
    "points",
    [
        [(0, 4), (8, 4), (16, 4), (24, 4)],
        [(4, 4), (68, 68), (132, 132), (196, 196)],  # a float32 fit gives 0.4493 or worse here
        [(64, 64), (192, 192), (320, 320), (448, 448)],  # and a determinant of 0 here
    ],
)
def test_points_in_a_line_give_the_one_dimensional_gaussian(points):
    expected = torch.tensor([0.9, 0.1, 0.1, 0.9]).double().neg().exp()
    torch.testing.assert_close(weights(points, ridge=8.3e-4), expected, atol=1e-5, rtol=0)


def test_coincident_points_and_a_single_point_weigh_one():
    assert weights([(4, 4)] * 4, ridge=8.3e-4).tolist() == [1.0] * 4
    assert weights([(1300, 700)], ridge=8.3e-4).tolist() == [1.0]


def test_unselected_points_take_no_part():
    points = torch.tensor([[0, 0], [8, 0], [500, 90], [0, 8], [8, 8.0]])
    selected = torch.tensor([True, True, False, True, True])
    found = gaussian_weights(points, selected, ridge=0.0)
    expected = torch.tensor([1, 1, 0, 1, 1]).double() * math.exp(-1)
    torch.testing.assert_close(found, expected)
    assert gaussian_weights(points, selected & False).tolist() == [0.0] * 5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(3, 12))
def test_weights_are_affine_invariant_and_bounded(seed, count):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 100
    transform = torch.tensor([[3.0, 1.0], [-2.0, 4.0]], dtype=torch.float64)
    selected = torch.ones(count, dtype=torch.bool)
    found = gaussian_weights(points, selected, ridge=0.0)
    moved = gaussian_weights(points @ transform + 700, selected, ridge=0.0)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=1e-9)
    assert -2 * found.log().sum() == pytest.approx(2 * count, rel=1e-6)
    assert -2 * found.log().min() <= count - 1 + 1e-6


@pytest.mark.parametrize(
    ("exponent", "good_class", "good_box"),
    [
        (0.0, 0.9, 0.5),
        (0.5, 0.6, 0.591608),
        (0.6, 0.553265, 0.611853),
        (0.8, 0.470432, 0.654444),
        (1.0, 0.4, 0.7),
    ],
)
def test_exponent_turns_the_order_of_predictions(exponent, good_class, good_box):
    found = prediction_quality(torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.7]), exponent)
    torch.testing.assert_close(found, torch.tensor([good_class, good_box]), atol=1e-6, rtol=0)


QUALITY = {
    (8, 12.0, 12.0): 0.9,
    (8, 20.0, 12.0): 0.8,
    (8, 12.0, 4.0): 0.7,
    (8, 12.0, 20.0): 0.6,  # outside the box
    (8, 4.0, 12.0): 0.5,
}


def test_gate_before_selects_inside_the_box():
    found = single_box_maps(QUALITY, COARSE_BOX, COARSE).view(1, 4, 4)
    expected = torch.zeros(1, 4, 4, dtype=torch.float64)
    expected[0, 1, 1], expected[0, 1, 2] = 0.846482, 0.311403
    expected[0, 0, 1], expected[0, 1, 0] = 0.223130, 0.311403
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    normalised = mean_mask(found)
    values = normalised[0, [1, 1, 0], [1, 2, 1]]
    expected = torch.tensor([0.211620, 0.077851, 0.055783]).double()
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_gate_after_fits_with_outside_positions():
    found = single_box_maps(QUALITY, COARSE_BOX, COARSE, gate="after").view(1, 4, 4)
    expected = torch.zeros(1, 4, 4, dtype=torch.float64)
    expected[0, 1, 1], expected[0, 1, 2], expected[0, 0, 1] = 0.282161, 0.074377, 0.103801
    torch.testing.assert_close(mean_mask(found), expected, atol=1e-6, rtol=0)


def test_levels_share_one_selection_and_one_fit():
    grids = (Grid(4, 4, 8), Grid(2, 2, 16))
    quality = {
        (8, 12.0, 12.0): 0.9,
        (8, 20.0, 12.0): 0.8,
        (8, 12.0, 20.0): 0.7,
        (16, 8.0, 8.0): 0.6,
        (8, 4.0, 4.0): 0.5,
    }
    found = single_box_maps(quality, [2.0, 2.0, 30.0, 30.0], grids)
    expected = torch.zeros(20, dtype=torch.float64)
    expected[[5, 6, 9, 16]] = torch.tensor([0.955563, 0.244365, 0.244365, 0.320984]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # Each level is divided by its own number of positions.
    fine, coarse = mean_mask(found[:16].view(1, 4, 4)), mean_mask(found[16:].view(1, 2, 2))
    expected = torch.tensor([0.318521, 0.081455, 0.081455, 0.320984]).double()
    values = torch.cat([fine.flatten()[[5, 6, 9]], coarse.flatten()[:1]])
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_background_is_what_lies_in_no_box():
    """Of the grid above, the rows y = 20 and y = 28."""
    inside = positions_in_boxes(COARSE, torch.tensor([[COARSE_BOX]]), torch.ones(1, 1).bool())
    assert inside.view(4, 4).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


def test_overlapping_boxes_keep_the_larger_weight():
    logits = torch.full((1, 16, 2), -9.0)
    logits[0, [0, 1, 4, 5], 0] = 3.0
    logits[0, [5, 6, 9, 15], 1] = 3.0
    gt = torch.tensor([[[0, 0, 24, 24], [8, 8, 32, 32.0]]])
    whole = torch.tensor([0.0, 0.0, 32.0, 32.0]).expand(1, 16, 4)
    found = importance_maps(
        logits,
        whole,
        gt,
        torch.tensor([[0, 1]]),
        torch.ones(1, 2).bool(),
        COARSE,
        ImportanceOptions(top_k=4, ridge=0),
    )[0].view(1, 4, 4)
    expected = torch.zeros(16)
    expected[[0, 1, 4, 5]] = torch.tensor([0.052554, 0.052554, 0.052554, 0.086647])
    expected[[6, 9, 15]] = torch.tensor([0.049714, 0.049714, 0.035622])
    torch.testing.assert_close(mean_mask(found).flatten(), expected, atol=1e-6, rtol=0)
    assert found[0, 1, 1] == pytest.approx(0.606531, abs=1e-6)
