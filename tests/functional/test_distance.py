"""Point-wise distances, masked means and standardisation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_det.functional.distance import (
    cosine_distance,
    masked_mean,
    masked_standardize,
    mean_distance,
    smooth_l1_distance,
)
from kd_det.functional.precision import at_least_float32

# One image, two channels, two cells; differences 1, -2 | 3, 0.
STUDENT = torch.tensor([[[[2.0, 1.0]], [[3.0, 5.0]]]])
TEACHER = torch.tensor([[[[1.0, 3.0]], [[0.0, 5.0]]]])
FIRST = torch.tensor([[[[1.0, 0.0]]]])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("p", "mask", "expected"),
    [(1, None, 6 / 4), (2, None, 14 / 4), (1, FIRST, 4 / 2), (2, FIRST, 10 / 2)],
)
def test_hand_values(p: int, mask: Tensor | None, expected: float) -> None:
    assert mean_distance(STUDENT, TEACHER, p=p, mask=mask).item() == pytest.approx(expected)


def test_masked_mean_is_over_the_cells_of_the_batch() -> None:
    """Three cells of one image and one of the other: not the mean of the images' means."""
    values = torch.tensor([[[[1.0, 2.0, 3.0]]], [[[10.0, 99.0, 99.0]]]])
    mask = torch.tensor([[[[1.0, 1.0, 1.0]]], [[[1.0, 0.0, 0.0]]]])
    assert masked_mean(values, mask).item() == pytest.approx(16 / 4)
    two_channels = torch.cat([values, 3 * values], 1)
    assert masked_mean(two_channels, mask).item() == pytest.approx(2 * 16 / 4)
    assert masked_mean(values, torch.ones_like(mask)) == masked_mean(values, None)


def test_empty_mask_gives_zero_on_the_graph() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = mean_distance(student, TEACHER, mask=torch.zeros(1, 1, 1, 2))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [1, 2])
def test_gradient(p: int) -> None:
    student, teacher = random(2, 3, 2, 2).requires_grad_(), random(2, 3, 2, 2, seed=1)
    mask = (random(2, 1, 2, 2, seed=2) > 0).double()
    assert torch.autograd.gradcheck(lambda s: mean_distance(s, teacher, p=p, mask=mask), student)


def test_no_gradient_to_the_teacher() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    mean_distance(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(given: torch.dtype, expected: torch.dtype) -> None:
    x = random(1, 2, 3, 3).to(given)
    assert at_least_float32(x).dtype == expected
    assert mean_distance(x, x + 1).dtype == expected
    assert masked_standardize(x).dtype == expected


def test_float16_squares_do_not_overflow_even_under_autocast() -> None:
    student = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mean_distance(student, -student)
    assert loss.dtype == torch.float32
    assert loss.item() == 600.0**2


class TestStandardize:
    def test_hand_values(self) -> None:
        """Mean 2, variance (1 + 1) / 2."""
        out = masked_standardize(torch.tensor([[[[1.0, 3.0]]]]), eps=0)
        torch.testing.assert_close(out, torch.tensor([[[[-1.0, 1.0]]]]))

    def test_each_channel_of_each_image_alone(self) -> None:
        x = random(3, 4, 5, 6)
        out = masked_standardize(x, eps=0)
        for n in range(3):
            for c in range(4):
                expected = (x[n, c] - x[n, c].mean()) / x[n, c].std(unbiased=False)
                torch.testing.assert_close(out[n, c], expected)

    def test_invariant_to_gain_and_offset(self) -> None:
        x = random(2, 3, 4, 4)
        gain = torch.tensor([0.5, 2.0, 7.0]).double()[:, None, None]
        torch.testing.assert_close(
            masked_standardize(x * gain + 3, eps=0), masked_standardize(x, eps=0)
        )

    def test_a_constant_channel_becomes_zero_with_finite_gradient(self) -> None:
        x = torch.full((1, 1, 3, 3), 5.0, requires_grad=True)
        out = masked_standardize(x)
        assert torch.equal(out, torch.zeros_like(out))
        out.square().sum().backward()
        assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]

    def test_masked_cells_do_not_count(self) -> None:
        x = random(2, 3, 4, 6)
        mask = torch.ones(2, 1, 4, 6, dtype=torch.float64)
        mask[:, :, :, 4:] = 0
        expected = masked_standardize(x[..., :4])
        torch.testing.assert_close(masked_standardize(x, mask=mask)[..., :4], expected)
        x[..., 4:] = 1e6
        torch.testing.assert_close(masked_standardize(x, mask=mask)[..., :4], expected)

    def test_an_image_without_cells_is_finite(self) -> None:
        assert torch.isfinite(masked_standardize(STUDENT, mask=0 * FIRST)).all()

    def test_gradient(self) -> None:
        mask = (random(2, 1, 3, 3, seed=2) > -0.5).double()
        x = random(2, 2, 3, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: masked_standardize(x, mask=mask), x)

    def test_squared_distance_of_standardised_maps_is_the_correlation(self) -> None:
        """PKD: mean (s - t)^2 = 2 (1 - r) for maps of mean 0 and variance 1."""
        s, t = random(1, 1, 8, 8), random(1, 1, 8, 8, seed=1)
        r = torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1]
        distance = mean_distance(masked_standardize(s, eps=0), masked_standardize(t, eps=0))
        torch.testing.assert_close(distance, 2 * (1 - r))


def test_cosine_by_hand() -> None:
    """Vectors of cells (3, 4) and (4, 3), then (1, 0) and (0, 2): 24/25 and 0."""
    student = torch.tensor([[[[3.0, 1.0]], [[4.0, 0.0]]]])
    teacher = torch.tensor([[[[4.0, 0.0]], [[3.0, 2.0]]]])
    assert cosine_distance(student, teacher).item() == pytest.approx((1 / 25 + 1) / 2)
    assert cosine_distance(student, teacher, mask=FIRST).item() == pytest.approx(1 / 25)
    assert cosine_distance(student, -3 * student).item() == pytest.approx(2)


def test_smooth_l1_by_hand() -> None:
    """Differences 1, -2 | 3, 0: 0.5, 1.5 | 2.5, 0."""
    assert smooth_l1_distance(STUDENT, TEACHER).item() == pytest.approx(4.5 / 4)
    assert smooth_l1_distance(STUDENT, TEACHER, mask=FIRST).item() == pytest.approx(3 / 2)


@pytest.mark.parametrize("distance", [cosine_distance, smooth_l1_distance])
def test_gradients_of_both(distance: Any) -> None:
    student, teacher = random(2, 3, 2, 2).requires_grad_(), random(2, 3, 2, 2, seed=1)
    teacher.requires_grad_()
    mask = (random(2, 1, 2, 2, seed=2) > 0).double()
    loss = lambda s: distance(s, teacher.detach(), mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(loss, student)
    distance(student, teacher).backward()
    assert teacher.grad is None
