"""Attention by hand, and the fused comparison of features against the plain one."""

import math

import pytest
import torch
from torch import Tensor

from kd_det.functional.attention import (
    channel_attention,
    compare_features,
    plain_comparison,
    spatial_attention,
)

# One image of two cells; channel 0 is (ln 3, 0).
TEACHER = torch.tensor([[[[math.log(3), 0.0]], [[0.0, 0.0]]]])


def random_maps() -> Tensor:
    """Student and teacher, (2, N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, 3, 4, generator=generator, dtype=torch.float64)


def test_attention_of_a_hand_computed_map():
    attention = channel_attention(TEACHER, tau=1.0)
    torch.testing.assert_close(attention[0, :, 0], torch.tensor([[1.5, 1.0], [0.5, 1.0]]))
    spatial = spatial_attention(TEACHER.abs().mean(1), tau=1.0)
    torch.testing.assert_close(spatial, torch.tensor([[[1.267949, 0.732051]]]))


def test_attention_sums_to_channels_and_positions():
    features = random_maps()[0]
    torch.testing.assert_close(
        channel_attention(features, 0.8).sum(1), torch.full((3, 3, 4), 5.0).double()
    )
    valid = torch.ones(3, 3, 4).bool()
    valid[1, 1:], valid[2] = False, False
    magnitude = features.abs().mean(1)
    sums = spatial_attention(magnitude, 0.8, valid).sum((1, 2))
    assert sums.tolist() == pytest.approx([12, 4, 0])
    assert spatial_attention(magnitude, 0.8).sum((1, 2)).tolist() == pytest.approx([12] * 3)


@pytest.mark.parametrize("block_rows", [3, 2, 1])
def test_maps_and_gradients_equal_the_plain_comparison(monkeypatch, block_rows):
    monkeypatch.setattr("kd_det.functional.attention._rows_per_block", lambda features: block_rows)
    student, teacher = random_maps()
    student.requires_grad_(), teacher.requires_grad_()
    weights = torch.rand(4, 3, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    found, expected = (f(student, teacher, 0.8) for f in (compare_features, plain_comparison))
    gradients = []
    for maps in (found, expected):
        loss = sum((m * w).sum() for m, w in zip(maps, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, (student, teacher), allow_unused=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert gradients[0][1] is gradients[1][1] is None


def test_zero_features_have_gradient_zero_through_the_absolute_value():
    student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    teacher = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1)
    compared = compare_features(student, teacher, 0.8)
    compared.student_magnitude.sum().backward()
    assert student.grad is not None and not student.grad.any()
