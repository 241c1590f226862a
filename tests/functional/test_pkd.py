"""PKD's distance: the specification's vectors, a slow loop, and what must not change it."""

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

from kd_det.functional.moments import Scope, channel_moments
from kd_det.functional.pkd import pearson_distance

S, T = standard_pair()
MASK = standard_mask()


def near(value: float) -> object:
    return pytest.approx(value, abs=1.5e-9)


def loop(student: Tensor, teacher: Tensor, mask: Tensor, scope: str, eps: float = 1e-6) -> float:
    """The formula, one group of cells and channel at a time."""
    images, channels = student.shape[:2]
    groups = [range(images)] if scope == "batch" else [range(n, n + 1) for n in range(images)]
    total = 0.0
    for group in groups:
        for c in range(channels):
            z = []
            for maps in (student, teacher):
                x = torch.cat([maps[n, c][mask[n, 0] > 0] for n in group])
                variance = x.var(correction=0) if len(x) else x.new_zeros(())
                dead = variance <= eps
                z.append(0 * x if dead else (x - x.mean()) / (variance + eps).sqrt())
            total += float((z[0] - z[1]).square().sum())
    return total / (2 * channels * max(float(mask.sum()), 1.0))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 0.902945285),
        ({"eps": 0.0}, 0.902956473),
        ({"scope": "image"}, 1.055871721),
        ({"mask": MASK}, 1.171052043),
        ({"mask": MASK, "scope": "image"}, 1.447848295),
    ],
)
def test_standard_pair(arguments: dict, expected: float) -> None:
    assert pearson_distance(S, T, **arguments).item() == near(expected)


def test_unbiased_deviation_of_the_release_gives_less_by_one_cell() -> None:
    z = []
    for x in (S, T):
        deviation = x.transpose(0, 1).flatten(1).std(1)[:, None, None]
        z.append((x - x.mean((0, 2, 3), keepdim=True)) / (deviation + 1e-6))
    released = (z[0] - z[1]).square().mean().item() / 2
    assert released == near(0.880377675)
    m = 2 * 4 * 5
    assert pearson_distance(S, T).item() * (m - 1) / m == pytest.approx(released, rel=1e-5)


def test_positive_and_negative_affine_copies() -> None:
    assert pearson_distance(3 * S - 2, T).item() == near(0.902954646)
    assert pearson_distance(-T, T).item() == near(1.999997086)
    assert pearson_distance(T, T).item() == 0
    assert pearson_distance(5 * T + 3, T).item() < 1e-6


def test_mean_over_channels_of_one_minus_the_correlation() -> None:
    rows = [(S[:, c].flatten(), T[:, c].flatten()) for c in range(3)]
    expected = sum(1 - torch.corrcoef(torch.stack(row))[0, 1].item() for row in rows) / 3
    assert pearson_distance(S, T, eps=0).item() == near(expected)


def test_a_constant_channel_counts_half_and_gets_no_gradient() -> None:
    student = S.clone()
    student[:, 1] = 0.7
    student.requires_grad_()
    loss = pearson_distance(student, T)
    assert loss.item() == near(0.824342992)
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[:, 1].any()
    assert grad[:, 0].any()


def test_two_levels_add() -> None:
    small = wave((2, 3, 2, 3), 1, 0.1, 0), wave((2, 3, 2, 3), 1.2, 0.17, 0.3)
    total = pearson_distance(S, T) + pearson_distance(*small)
    assert total.item() == near(1.681771640)


def test_gradient_of_the_standard_pair() -> None:
    student = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pearson_distance(student, T), student)
    assert grad[0, 0, 0, 0].item() == near(-0.023081996)
    assert grad[1, 2, 3, 4].item() == near(-0.092220245)
    assert grad.abs().sum().item() == near(2.668801569)
    assert grad.sum((0, 2, 3)).abs().max().item() < 1e-15


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("masked", [False, True])
def test_parity_with_the_loop(scope: Scope, masked: bool) -> None:
    student, teacher = random(3, 4, 3, 5), random(3, 4, 3, 5, seed=1)
    student[1, 2], teacher[:, 3] = 2.5, -1.0
    mask = (random(3, 1, 3, 5, seed=2) > 0).double() if masked else torch.ones(3, 1, 3, 5).double()
    value = pearson_distance(student, teacher, mask=mask if masked else None, scope=scope)
    assert value.item() == pytest.approx(loop(student, teacher, mask, scope), rel=1e-12)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_gradcheck(scope: Scope) -> None:
    student, teacher = random(2, 2, 3, 3).requires_grad_(), random(2, 2, 3, 3, seed=1)
    mask = (random(2, 1, 3, 3, seed=2) > -0.5).double()

    def loss(x: Tensor) -> Tensor:
        return pearson_distance(x, teacher, mask=mask, scope=scope)

    assert torch.autograd.gradcheck(loss, student)


def test_masked_cells_do_not_matter() -> None:
    junk = S + 100 * random(2, 3, 4, 5) * (1 - MASK)
    other = T + 100 * random(2, 3, 4, 5, seed=1) * (1 - MASK)
    assert pearson_distance(junk, other, mask=MASK).item() == near(1.171052043)


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("cells", [0, 1])
def test_no_cell_or_one_gives_zero_on_the_graph(scope: Scope, cells: int) -> None:
    mask = torch.zeros_like(MASK)
    mask[0, 0, 0, :cells] = 1
    student = S.clone().requires_grad_()
    loss = pearson_distance(student, T, mask=mask, scope=scope)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(S))


def test_a_map_of_one_cell_is_zero() -> None:
    assert pearson_distance(S[:1, :, :1, :1], T[:1, :, :1, :1]).item() == 0


def test_an_image_alone_has_its_value_of_the_batch_with_image_scope() -> None:
    alone = [pearson_distance(S[n : n + 1], T[n : n + 1]).item() for n in range(2)]
    assert sum(alone) / 2 == near(1.055871721)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = T.clone().requires_grad_()
    assert not pearson_distance(S, teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    assert_float32_whatever_autocast_says(pearson_distance, S, T, dtype=dtype)


def test_moments_of_values_far_from_zero_keep_their_digits() -> None:
    """Mean of squares minus square of the mean would give 0 in float32."""
    x = (10000 + random(2, 1, 8, 8)).float()
    expected = x.double().var(correction=0).item()
    assert channel_moments(x).variance.item() == pytest.approx(expected, rel=1e-4)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope is 'level', expected 'batch' or 'image'"):
        pearson_distance(S, T, scope="level")  # type: ignore[arg-type]


def test_channels_last_equals_contiguous() -> None:
    last = [x.contiguous(memory_format=torch.channels_last) for x in (S, T)]
    assert pearson_distance(*last).item() == near(0.902945285)
