"""FRS's losses: the specification's vectors, a slow loop, and what must not change them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from waves import (
    assert_float32_whatever_autocast_says,
    random,
    standard_mask,
    standard_pair,
    wave,
)

from kd_det.functional.frs import feature_loss, head_loss, richness
from kd_det.functional.moments import Scope

S, T = standard_pair()
ZS, ZT = wave((2, 4, 4, 5), 2, 0.21, 1) - 1, wave((2, 4, 4, 5), 3, 0.37, 0) - 1
W = richness(ZT)
MASK = standard_mask()


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(x: float, q: float) -> float:
    return -q * math.log(sigmoid(x)) - (1 - q) * math.log(1 - sigmoid(x))


def loop(
    maps: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], scope: str, mask: Tensor
) -> list[float]:
    """Feature loss, and head loss minus the entropy: one cell and channel at a time."""
    images, _, height, width = maps[0].shape
    sums = torch.zeros(images, 3, dtype=torch.float64)
    for n in range(images):
        for i in range(height):
            for j in range(width):
                s, t, x, z = (v[n, :, i, j].tolist() for v in (*maps, *logits))
                w = max(sigmoid(value) for value in z) * mask[n, 0, i, j].item()
                sums[n, 0] += w * sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
                for a, b in zip(x, z, strict=True):
                    sums[n, 1] += w * (cross_entropy(a, sigmoid(b)) - cross_entropy(b, sigmoid(b)))
                sums[n, 2] += w
    if scope == "batch":
        sums = sums.sum(0, keepdim=True)
    return (sums[:, :2] / sums[:, 2:].clamp(min=1e-6)).mean(0).tolist()


def test_richness_of_the_vectors() -> None:
    assert W.shape == (2, 1, 4, 5)
    found = [W[0, 0, 0, 0].item(), W[1, 0, 3, 4].item(), *W.sum((1, 2, 3)).tolist()]
    assert found == near(0.845027866, 0.852682023, 16.077823184, 16.072311729)


@pytest.mark.parametrize(
    ("scope", "mask", "expected"),
    [
        ("image", None, (3.564678387, 3.598908042, 2.021941983)),
        ("batch", None, (3.564829380, 3.598919350, 2.021947480)),
        ("image", MASK, (3.191933904, 3.583515901, 2.005278751)),
    ],
)
def test_standard_pair(
    scope: Scope, mask: Tensor | None, expected: tuple[float, float, float]
) -> None:
    found = [
        feature_loss(S, T, W, scope=scope, mask=mask),
        head_loss(ZS, ZT, W, scope=scope, mask=mask, subtract_entropy=False),
        head_loss(ZS, ZT, W, scope=scope, mask=mask),
    ]
    assert [value.item() for value in found] == near(*expected)


def test_a_teacher_that_sees_nothing() -> None:
    nothing = torch.full_like(ZT, -50.0)
    student, logits = S.clone().requires_grad_(), ZS.clone().requires_grad_()
    weight = richness(nothing)
    losses = feature_loss(student, T, weight), head_loss(logits, nothing, weight)
    assert [value.item() for value in losses] == near(0, 0)
    torch.stack(losses).sum().backward()
    assert torch.isfinite(student.grad).all() and torch.isfinite(logits.grad).all()


def test_a_student_like_its_teacher() -> None:
    plain = head_loss(ZT, ZT, W, subtract_entropy=False)
    assert plain.item() == near(1.576966058)[0]
    assert feature_loss(T, T, W).item() == 0
    assert head_loss(ZT, ZT, W).item() == 0


def test_gradients_of_the_image_scope() -> None:
    student, logits = S.clone().requires_grad_(), ZS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(feature_loss(student, T, W), student)
    assert [grad[0, 0, 0, 0].item(), grad[1, 2, 3, 4].item()] == near(-0.018638554, -0.096075047)
    (grad,) = torch.autograd.grad(head_loss(logits, ZT, W), logits)
    assert [grad[0, 0, 0, 0].item(), grad[1, 3, 3, 4].item()] == near(0.010392243, -0.011728873)
    plain = head_loss(logits, ZT, W, subtract_entropy=False)
    torch.testing.assert_close(torch.autograd.grad(plain, logits)[0], grad)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_parity_with_the_loop(scope: Scope) -> None:
    maps = random(2, 3, 3, 4), random(2, 3, 3, 4, seed=1)
    logits = 2 * random(2, 5, 3, 4, seed=2), 3 * random(2, 5, 3, 4, seed=3)
    mask = (random(2, 1, 3, 4, seed=4) > -0.5).double()
    weight = richness(logits[1])
    found = [
        feature_loss(*maps, weight, scope=scope, mask=mask).item(),
        head_loss(*logits, weight, scope=scope, mask=mask).item(),
    ]
    assert found == pytest.approx(loop(maps, logits, scope, mask), rel=1e-12)


@pytest.mark.parametrize("loss", [feature_loss, head_loss])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradcheck(loss: Callable[..., Tensor], scope: Scope) -> None:
    student, teacher = random(2, 2, 3, 3).requires_grad_(), random(2, 2, 3, 3, seed=1)
    mask = (random(2, 1, 3, 3, seed=2) > -0.5).double()
    weight = richness(teacher)

    def value(x: Tensor) -> Tensor:
        return loss(x, teacher, weight, scope=scope, mask=mask)

    assert torch.autograd.gradcheck(value, student)


@pytest.mark.parametrize("loss", [feature_loss, head_loss])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_an_empty_mask_gives_zero_on_the_graph(loss: Callable[..., Tensor], scope: Scope) -> None:
    student = S.clone().requires_grad_()
    value = loss(student, T, W, scope=scope, mask=torch.zeros_like(MASK))
    assert value.item() == 0
    value.backward()
    assert torch.equal(student.grad, torch.zeros_like(S))


def test_masked_cells_do_not_matter() -> None:
    outside = 1 - MASK
    logits = ZT + 20 * outside
    found = [
        feature_loss(S + 9 * outside, T, richness(logits), mask=MASK).item(),
        head_loss(ZS - 9 * outside, logits, richness(logits), mask=MASK).item(),
    ]
    assert found == near(3.191933904, 2.005278751)


def test_image_scope_is_the_mean_of_the_images() -> None:
    alone = [feature_loss(S[n : n + 1], T[n : n + 1], W[n : n + 1]).item() for n in range(2)]
    assert sum(alone) / 2 == near(3.564678387)[0]


def test_the_teacher_gets_no_gradient() -> None:
    teacher, logits = T.clone().requires_grad_(), ZT.clone().requires_grad_()
    assert not richness(logits).requires_grad
    assert not feature_loss(S, teacher, W).requires_grad
    assert not head_loss(ZS, logits, W).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    assert_float32_whatever_autocast_says(feature_loss, S, T, W, dtype=dtype)
    assert_float32_whatever_autocast_says(head_loss, ZS, ZT, W, dtype=dtype)


def test_logits_that_float16_cannot_exponentiate() -> None:
    logits = torch.full((1, 2, 2, 2), -30.0, dtype=torch.float16)
    assert head_loss(-logits, logits, richness(logits)).item() < 1e-2
    assert head_loss(-logits, logits, torch.ones(1, 1, 2, 2)).item() == pytest.approx(60)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope is 'level', expected 'batch' or 'image'"):
        feature_loss(S, T, W, scope="level")  # type: ignore[arg-type]
