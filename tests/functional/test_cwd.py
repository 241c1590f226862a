"""CWD's divergence: the specification's vectors, a slow loop, and what must not change it."""

import pytest
import torch
from torch import Tensor
from waves import assert_float32_whatever_autocast_says, random, standard_mask, standard_pair

from kd_det.functional.cwd import channel_divergence

S, T = standard_pair()
MASK = standard_mask()


def near(value: float) -> object:
    return pytest.approx(value, abs=1.5e-9)


def loop(student: Tensor, teacher: Tensor, tau: float, mask: Tensor) -> float:
    """The formula, one channel of one image at a time."""
    images, channels = student.shape[:2]
    total = 0.0
    for n in range(images):
        inside = mask[n, 0] > 0
        for c in range(channels):
            p = torch.softmax(student[n, c][inside] / tau, 0)
            q = torch.softmax(teacher[n, c][inside] / tau, 0)
            total += float((q * (q / p).log()).sum())
    return tau**2 / (images * channels) * total


@pytest.mark.parametrize(
    ("gain", "tau", "mask", "expected"),
    [
        (1, 1.0, None, 0.258132020),
        (1, 4.0, None, 0.295836951),
        (1000, 1.0, None, 446.600905009),
        (1, 1.0, MASK, 0.235870825),
    ],
)
def test_standard_pair(gain: float, tau: float, mask: Tensor | None, expected: float) -> None:
    assert channel_divergence(gain * S, gain * T, tau=tau, mask=mask).item() == near(expected)


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.225626064), (4.0, 0.271430999)])
def test_a_student_that_looks_nowhere(tau: float, expected: float) -> None:
    assert channel_divergence(torch.zeros_like(S), T, tau=tau).item() == near(expected)


def test_a_number_per_channel_changes_nothing() -> None:
    assert abs(channel_divergence(T + 5, T).item()) < 1e-14
    offset = random(2, 3, 1, 1)
    assert channel_divergence(S + offset, T).item() == near(0.258132020)


def test_gradient_of_the_standard_pair() -> None:
    student = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(channel_divergence(student, T), student)
    assert grad[0, 0, 0, 0].item() == near(-0.001523450)
    assert grad[1, 2, 3, 4].item() == near(-0.008221471)
    assert grad.abs().sum().item() == near(0.576199619)
    assert grad.sum((2, 3)).abs().max().item() < 1e-15


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_gradient_in_closed_form(tau: float) -> None:
    """tau / (N C) (p - q)"""
    student = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(channel_divergence(student, T, tau=tau), student)
    p, q = ((x / tau).flatten(2).softmax(2).view_as(x) for x in (S, T))
    torch.testing.assert_close(grad, tau / 6 * (p - q))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_parity_with_the_loop(tau: float) -> None:
    student, teacher = random(3, 2, 3, 5), random(3, 2, 3, 5, seed=1)
    mask = (random(3, 1, 3, 5, seed=2) > 0).double()
    value = channel_divergence(student, teacher, tau=tau, mask=mask)
    assert value.item() == pytest.approx(loop(student, teacher, tau, mask), rel=1e-12)


def test_gradcheck() -> None:
    student, teacher = random(2, 2, 3, 3).requires_grad_(), random(2, 2, 3, 3, seed=1)
    mask = (random(2, 1, 3, 3, seed=2) > -0.5).double()

    def loss(x: Tensor) -> Tensor:
        return channel_divergence(x, teacher, tau=2.0, mask=mask)

    assert torch.autograd.gradcheck(loss, student)


def test_masked_cells_neither_matter_nor_learn() -> None:
    junk = (S + 100 * random(2, 3, 4, 5) * (1 - MASK)).requires_grad_()
    other = T + 100 * random(2, 3, 4, 5, seed=1) * (1 - MASK)
    loss = channel_divergence(junk, other, mask=MASK)
    assert loss.item() == near(0.235870825)
    (grad,) = torch.autograd.grad(loss, junk)
    assert not (grad * (1 - MASK)).any()


def test_a_batch_is_the_mean_of_its_images() -> None:
    alone = [channel_divergence(S[n : n + 1], T[n : n + 1]).item() for n in range(2)]
    assert sum(alone) / 2 == near(0.258132020)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_without_cells_gives_zero_on_the_graph(dtype: torch.dtype) -> None:
    mask = MASK.to(dtype).clone()
    mask[1] = 0
    student = S.to(dtype).clone().requires_grad_()
    loss = channel_divergence(student, T.to(dtype), mask=mask)
    expected = channel_divergence(S[:1].to(dtype), T[:1].to(dtype)).item() / 2
    assert loss.item() == pytest.approx(expected)
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[1].any()
    nothing = channel_divergence(student, T.to(dtype), mask=0 * mask)
    assert nothing.item() == 0
    (grad,) = torch.autograd.grad(nothing, student)
    assert not grad.any()


def test_one_cell_is_zero() -> None:
    assert channel_divergence(S[..., :1, :1], T[..., :1, :1]).item() == 0


def test_the_teacher_gets_no_gradient() -> None:
    assert not channel_divergence(S, T.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    assert_float32_whatever_autocast_says(channel_divergence, S, T, dtype=dtype)


def test_channels_last_equals_contiguous() -> None:
    last = [x.contiguous(memory_format=torch.channels_last) for x in (S, T)]
    assert channel_divergence(*last).item() == near(0.258132020)
