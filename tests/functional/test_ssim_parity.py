"""SSIM against a loop over positions, and against the plain version."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from ssim_scenes import dissimilarity, random_maps, similarity

from kd_det.functional.ssim import SSIMOptions, min_max_normalize, plain_ssim, ssim_loss, ssim_map

ALL_TERMS = list(itertools.product((0, 1), repeat=3))[1:]


def slow_ssim(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    border: str = "reflect",
    window: str = "gaussian",
    window_size: int = 11,
    sigma: float = 1.5,
    exponents: tuple[int, int, int] = (1, 1, 1),
) -> np.ndarray:
    """SSIM of maps (N, C, H, W) in [0, 1], position by position, with the sums written out."""
    n, c, h, w = student.shape
    r = window_size // 2
    c1, c2 = 0.01**2, 0.03**2
    result = np.full(student.shape, np.nan)
    for a, b, i, j in itertools.product(range(n), range(c), range(h), range(w)):
        weights, xs, ys = [], [], []
        for u, v in itertools.product(range(-r, r + 1), repeat=2):
            p, q = i + u, j + v
            if border == "reflect":
                p, q = bounce(p, h), bounce(q, w)
            if 0 <= p < h and 0 <= q < w:
                gauss = math.exp(-(u * u + v * v) / (2 * sigma**2))
                weights.append(gauss if window == "gaussian" else 1.0)
                xs.append(student[a, b, p, q])
                ys.append(teacher[a, b, p, q])
        if border == "valid" and len(weights) < window_size**2:
            continue
        g, x, y = np.array(weights) / sum(weights), np.array(xs), np.array(ys)
        mu_x, mu_y = (g * x).sum(), (g * y).sum()
        var_x, var_y = (g * (x - mu_x) ** 2).sum(), (g * (y - mu_y) ** 2).sum()
        cov = (g * (x - mu_x) * (y - mu_y)).sum()
        std = math.sqrt(var_x * var_y)
        luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
        contrast = (2 * std + c2) / (var_x + var_y + c2)
        structure = (cov + c2 / 2) / (std + c2 / 2)
        terms = zip((luminance, contrast, structure), exponents, strict=True)
        result[a, b, i, j] = math.prod(term**power for term, power in terms)
    return result[:, :, r:-r, r:-r] if border == "valid" else result


def bounce(position: int, length: int) -> int:
    """Mirror a position about the first and the last one until it lies on the map."""
    while not 0 <= position < length:
        if length == 1:
            return 0
        position = -position if position < 0 else 2 * (length - 1) - position
    return position


@pytest.mark.parametrize("exponents", ALL_TERMS)
@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
@pytest.mark.parametrize("window", ["gaussian", "box"])
def test_map_equals_the_slow_loop(border, window, exponents):
    s, t = random_maps((1, 1, 5, 6))
    options = {"border": border, "window": window, "exponents": exponents, "window_size": 5}
    expected = slow_ssim(s.numpy(), t.numpy(), **options)
    ssim = similarity(s, t, normalize="none", **options)
    np.testing.assert_allclose(ssim.numpy(), expected, atol=1e-6)
    loss = dissimilarity(s, t, normalize="none", **options)
    assert loss.item() == pytest.approx((1 - ssim.mean().item()) / 2, abs=1e-12)


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (6, 6), (20, 3)])
def test_small_maps_equal_the_slow_loop(border, size):
    s, t = random_maps((1, 1, *size))
    expected = slow_ssim(s.numpy(), t.numpy(), border=border, sigma=2.0)
    ssim = similarity(s, t, normalize="none", border=border, sigma=2.0)
    np.testing.assert_allclose(ssim.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
def test_blocks_of_large_maps_meet_without_seams(border):
    # 70 positions are cut into four blocks; a long thin map keeps the loop short.
    for size in ((70, 11), (11, 70)):
        s, t = random_maps((1, 1, *size))
        expected = slow_ssim(s.numpy(), t.numpy(), border=border)
        ssim = similarity(s, t, normalize="none", border=border)
        np.testing.assert_allclose(ssim.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("per", ["channel", "image", "level"])
def test_min_max_of_each_group(per):
    s, t = random_maps((2, 3, 4, 5))
    s, t = 3 * s - 1, t * torch.arange(1, 7).double().view(2, 3, 1, 1)
    groups = {
        "channel": [(n, c) for n in range(2) for c in range(3)],
        "image": [0, 1],
        "level": [...],
    }
    scaled = []
    for x in (s, t):
        y = x.clone()
        for group in groups[per]:
            y[group] = (x[group] - x[group].min()) / (x[group].max() - x[group].min() + 1e-6)
        torch.testing.assert_close(min_max_normalize(x, per=per), y, rtol=0, atol=1e-12)
        scaled.append(y)
    expected = dissimilarity(*scaled, normalize="none")
    torch.testing.assert_close(dissimilarity(s, t, normalize=per), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponents", ALL_TERMS)
@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
@pytest.mark.parametrize("normalize", ["channel", "image", "level", "none"])
def test_map_loss_and_gradient_equal_the_plain_version(normalize, border, exponents):
    s, t = random_maps((2, 3, 9, 14))
    options = SSIMOptions(
        window_size=5, border=border, normalize=normalize, exponents=exponents, chunk_elements=300
    )
    slow, fast = s.clone().requires_grad_(), s.clone().requires_grad_()
    ssim = plain_ssim(slow, t, options)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-9)
    close(ssim_map(s, t, options), ssim.detach())
    expected, loss = (1 - ssim).mean() / 2, ssim_loss(fast, t, options)
    close(loss, expected)
    close(torch.autograd.grad(loss, fast), torch.autograd.grad(expected, slow))


def test_large_maps_equal_the_plain_version():
    s, t = random_maps((2, 4, 70, 45))
    torch.testing.assert_close(ssim_map(s, t), plain_ssim(s, t), rtol=0, atol=1e-10)


def test_plain_version_has_the_teacher_constant():
    s, t = random_maps((1, 2, 4, 5))
    s.requires_grad_(), t.requires_grad_()
    plain_ssim(s, t).sum().backward()
    assert s.grad is not None and t.grad is None
