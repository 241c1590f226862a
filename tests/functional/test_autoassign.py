"""AutoAssign's terms: the description's numbers, hand-computed cases, gradients."""

import math

import pytest
import torch
from torch import Tensor

from kd_det.functional.autoassign import (
    center_prior,
    center_terms,
    foreground_share,
    negative_terms,
    negative_weights,
    pairs_inside,
    positive_terms,
)

ONE_BOX = torch.zeros(3, dtype=torch.int64)


def test_prior_of_the_description() -> None:
    # Position (24, 8), stride 8; the centre (26, 16) is 2 and 8 pixels away: -.25 and -1 strides.
    prior = center_prior(
        torch.tensor([[24.0, 8]]),
        torch.tensor([8.0]),
        torch.tensor([[10.0, 2, 42, 30]]),
        torch.tensor([[0.1, -0.2]]),
        torch.tensor([[1.0, -0.5]]),
    )
    assert prior.item() == pytest.approx(0.261519, abs=1e-6)
    by_hand = math.exp(-(0.35**2) / 2 - 0.8**2 / (2 * 0.25))
    assert prior.item() == pytest.approx(by_hand)


def test_positive_term_of_the_description() -> None:
    giou = torch.tensor([0.8, 0.9, 0.2])
    confidence = torch.tensor([0.6, 0.3, 0.1]) * (-5 * (1 - giou)).exp()
    torch.testing.assert_close(
        confidence, torch.tensor([0.220728, 0.181959, 0.001832]), rtol=0, atol=1e-6
    )
    terms = positive_terms(confidence, torch.tensor([1, 0.5, 0.25]), ONE_BOX, 1)
    assert terms.tolist() == pytest.approx([1.651568], abs=1e-5)


def test_temperature_chooses_between_the_mean_and_the_best() -> None:
    confidence, prior = torch.tensor([0.2, 0.4, 0.6]), torch.ones(3)
    mean = positive_terms(confidence, prior, ONE_BOX, 1, temperature=1e4)
    best = positive_terms(confidence, prior, ONE_BOX, 1, temperature=0.01)
    assert mean.item() == pytest.approx(-math.log(0.4), abs=1e-4)
    assert best.item() == pytest.approx(-math.log(0.6), abs=1e-4)


def test_boxes_do_not_mix_and_one_without_position_costs_nothing() -> None:
    confidence, prior = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([1.0, 0.5, 1])
    terms = positive_terms(confidence, prior, torch.tensor([2, 0, 2]), 3)
    first = positive_terms(confidence[1:2], prior[1:2], ONE_BOX[:1], 1)
    third = positive_terms(confidence[::2], prior[::2], ONE_BOX[:2], 1)
    torch.testing.assert_close(terms, torch.cat([first, torch.zeros(1), third]))
    assert terms[0].item() == pytest.approx(-math.log(0.9))


def test_a_box_whose_prior_vanishes_costs_100() -> None:
    confidence = torch.tensor([0.5, 0.5], requires_grad=True)
    terms = positive_terms(confidence, torch.zeros(2), ONE_BOX[:2], 1)
    terms.sum().backward()
    assert terms.item() == 100
    assert confidence.grad is not None and confidence.grad.isfinite().all()


def test_negatives_of_the_description() -> None:
    share = foreground_share(torch.tensor([0.2, 0.5, 0.9]), ONE_BOX, 1)
    weights = 1 - share
    assert weights.tolist() == pytest.approx([1, 0.914286, 0], abs=1e-6)
    terms = negative_terms(torch.tensor([0.7, 0.4, 0.6]) * weights)
    assert terms.tolist() == pytest.approx([0.589947, 0.060889, 0], abs=1e-6)


def test_one_position_or_equal_ones_are_no_negatives() -> None:
    overlap, box = torch.tensor([0.3, 0.6, 0.6, 1.0]), torch.tensor([0, 1, 1, 2])
    assert foreground_share(overlap, box, 3).tolist() == [1, 1, 1, 1]


def test_of_several_boxes_of_a_class_the_largest_share_counts() -> None:
    share = torch.tensor([0.25, 0.75, 0.5])
    # Two boxes of class 1 at position 2, in both orders; one of class 0 at position 3.
    classes = torch.tensor([1, 1, 0])
    for order in ([0, 1, 2], [1, 0, 2]):
        weights = negative_weights(
            share[order], torch.tensor([2, 2, 3]), classes[order], torch.zeros(4, 2)
        )
        assert weights.tolist() == [[1, 1], [1, 1], [1, 0.25], [0.5, 1]]


def test_certain_negatives_cost_100() -> None:
    probabilities = torch.tensor([0.0, 1.0])
    assert negative_terms(probabilities).tolist() == [0, 100]


def test_center_term_of_each_image() -> None:
    # Image 0: two boxes (one without position) over 0.5 + 1.5; image 1: boxes but no pair; 2: none.
    terms = center_terms(torch.tensor([0.5, 1.5]), torch.tensor([0, 0]), torch.tensor([2, 3, 0]))
    assert terms.tolist() == [1, 0, 0]


def test_sides_are_outside_and_levels_do_not_matter() -> None:
    points = torch.tensor([[0.0, 0], [8, 0], [8, 8], [16, 8], [16, 16]])
    boxes = torch.tensor([[0.0, -1, 16, 9], [100, 100, 108, 108]])
    box, position = pairs_inside(points, boxes)
    assert box.tolist() == [0, 0] and position.tolist() == [1, 2]


def test_pairs_of_the_description() -> None:
    cells = [(8, r, c) for r in range(4) for c in range(4)]
    cells += [(16, r, c) for r in range(2) for c in range(2)]
    points = torch.tensor([[float(c * s), float(r * s)] for s, r, c in cells])
    boxes = torch.tensor([[2.3, 3.1, 23.9, 17.7], [9.2, 6.4, 30.6, 30.2]])
    assert pairs_inside(points, boxes)[0].bincount().tolist() == [5, 7]


def test_no_boxes() -> None:
    nothing, index = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert pairs_inside(torch.zeros(5, 2), torch.zeros(0, 4))[0].tolist() == []
    total = positive_terms(nothing, nothing, index, 0).sum()
    total = total + center_terms(nothing, index, torch.tensor([0, 0])).sum()
    assert total == 0 and total.requires_grad
    assert foreground_share(torch.zeros(0), index, 0).shape == (0,)
    assert (negative_weights(torch.zeros(0), index, index, torch.zeros(2, 3)) == 1).all()


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    points, strides = rand(6, 2) * 8, torch.full((6,), 4.0, dtype=torch.float64)
    boxes = torch.cat([rand(6, 2), 6 + rand(6, 2)], dim=1)
    box = torch.tensor([0, 0, 0, 1, 1, 3])

    def total(confidence: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
        prior = center_prior(points, strides, boxes, mean, sigma)
        positive = positive_terms(confidence, prior, box, 4).sum()
        image = torch.tensor([0, 0, 0, 0, 0, 2])
        center = center_terms(prior, image, torch.tensor([2, 0, 1])).sum()
        return positive + center + negative_terms(confidence).sum()

    leaves = [0.1 + 0.8 * rand(6), rand(6, 2) - 0.5, 0.5 + rand(6, 2)]
    assert torch.autograd.gradcheck(total, [x.requires_grad_() for x in leaves])
