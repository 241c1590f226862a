"""SSIM against closed forms, frozen reference values, a slow loop and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional.ssim import min_max_normalize, ssim_loss, ssim_map

ALL_TERMS = list(itertools.product((0, 1), repeat=3))[1:]


def integer_maps(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Student and teacher in [0, 1]."""
    n, c, i, j = torch.meshgrid(*(torch.arange(k) for k in shape), indexing="ij")
    teacher = ((37 * i + 101 * j + 53 * c + 29 * n) % 97).double() / 96
    student = ((59 * i + 23 * j + 71 * c + 13 * n + 7 * ((i * j) % 5)) % 89).double() / 88
    return student, teacher


def waves() -> Tensor:
    i, j = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    wave = torch.sin(2 * math.pi * i.double() / 16) * torch.cos(2 * math.pi * j.double() / 16)
    return (0.5 + 0.25 * wave)[None, None]


def checkerboard(amplitude: float) -> Tensor:
    i, j = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return (0.5 + amplitude * (1 - 2 * ((i + j) % 2)).double())[None, None]


def random_maps(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(shape, generator=generator, dtype=torch.float64)
    return 0.7 * teacher + 0.5 * torch.rand(shape, generator=generator).double(), teacher


def gradient(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    ssim_loss(leaf, teacher, **options).backward()
    return leaf.grad


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


# --- published closed forms and frozen values, no normalisation ---


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (4, 11), (7, 11), (32, 20)])
def test_constant_maps_have_the_closed_form(border, size):
    # Windows that lose mass at the border (zero padding) would give 0.1775778534 on 7x11.
    for a, b in ((0.5, 0.25), (0.0, 1.0), (0.0, 0.0)):
        s, t = (torch.full((1, 2, *size), x, dtype=torch.float64) for x in (a, b))
        expected = (1 - (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) / 2
        loss = ssim_loss(s, t, normalize="none", border=border)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_identical_maps_have_zero_loss_and_gradient():
    _, t = random_maps((2, 3, 13, 21))
    for normalize in ("none", "channel", "image", "level"):
        assert abs(ssim_loss(t, t, normalize=normalize).item()) < 1e-15
        assert abs(ssim_loss(t.float(), t.float(), normalize=normalize).item()) < 1e-7
        assert gradient(t, t, normalize=normalize).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("change", "loss", "luminance", "contrast", "structure"),
    [
        (lambda t: t + 0.05, 0.0024904447, 0.9950191105, 1, 1),
        (lambda t: t + 0.1, 0.0089294777, 0.9821410446, 1, 1),
        (lambda t: t + 0.2, 0.0289247732, 0.9421504537, 1, 1),
        (lambda t: 0.5 + 0.5 * (t - 0.5), 0.0923556823, 0.9953201454, 0.8191352798, 1),
        (lambda t: 0.5 + 0.8 * (t - 0.5), 0.0116721198, 0.9992047507, 0.9774332923, 1),
        (lambda t: 0.5 + 2 * (t - 0.5), 0.1081591927, 0.9733234543, 0.8051886289, 1),
        (lambda t: 1 - t, 0.9109745309, 0.9375698437, 1, -0.8755672915),
    ],
)
def test_waves(change, loss, luminance, contrast, structure):
    t = waves()
    s = change(t)
    assert ssim_loss(s, t, normalize="none").item() == pytest.approx(loss, abs=1e-9)
    assert ssim_loss(s.float(), t.float(), normalize="none").item() == pytest.approx(loss, abs=1e-6)
    for k, expected in enumerate((luminance, contrast, structure)):
        exponents = tuple(int(k == m) for m in range(3))
        mean = ssim_map(s, t, normalize="none", exponents=exponents).mean().item()
        # Each deviation has 1e-7 C2 under its root, so single terms agree to a few 1e-8.
        assert mean == pytest.approx(expected, abs=1e-7 if k else 1e-9)


def test_checkerboard():
    t = checkerboard(0.25)
    half = ssim_loss(checkerboard(0.125), t, normalize="none").item()
    assert half == pytest.approx(0.0988611199, abs=1e-9)
    for s in (checkerboard(-0.25), t.roll(1, dims=3)):
        assert ssim_loss(s, t, normalize="none").item() == pytest.approx(0.9928514694, abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "border", "expected"),
    [
        ((1, 2, 5, 7), "reflect", 0.4214619929),
        ((1, 2, 5, 7), "renorm", 0.4146486869),
        ((1, 2, 7, 11), "reflect", 0.4071881310),
        ((1, 2, 7, 11), "renorm", 0.4122219494),
        ((2, 3, 25, 42), "reflect", 0.4925277347),
        ((2, 3, 25, 42), "renorm", 0.4927644250),
        ((2, 3, 25, 42), "valid", 0.4952853826),
    ],
)
def test_integer_maps(shape, border, expected):
    s, t = integer_maps(shape)
    options = {"normalize": "none", "border": border}
    assert ssim_loss(s, t, **options).item() == pytest.approx(expected, abs=1e-9)
    single = ssim_loss(s.float(), t.float(), **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 2, 5, 7), (0.0049058983, 0.0008655491, 0.4204386743)),
        ((2, 3, 25, 42), (0.0024152177, 0.0006566378, 0.4924731104)),
    ],
)
def test_single_terms_of_integer_maps(shape, expected):
    s, t = integer_maps(shape)
    for k in range(3):
        exponents = tuple(int(k == m) for m in range(3))
        loss = ssim_loss(s, t, normalize="none", exponents=exponents).item()
        assert loss == pytest.approx(expected[k], abs=1e-9)


def test_gradient_of_integer_maps():
    g = gradient(*integer_maps((1, 2, 5, 7)), normalize="none")
    assert g[0, 0, 0, 0].item() == pytest.approx(0.0151559427, abs=1e-9)
    assert g[0, 0, 2, 3].item() == pytest.approx(-0.0512097775, abs=1e-9)
    assert g[0, 1, 4, 6].item() == pytest.approx(0.0076927976, abs=1e-9)
    assert g.abs().sum().item() == pytest.approx(1.3564180472, abs=1e-9)
    g = gradient(*integer_maps((2, 3, 25, 42)), normalize="none")
    assert g.abs().sum().item() == pytest.approx(1.4431716367, abs=1e-9)
    assert g.norm().item() == pytest.approx(0.0212071107, abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "border", "loss", "total"),
    [
        ((1, 2, 5, 7), "reflect", 0.4216926306, 0.3449652215),
        ((1, 2, 7, 11), "reflect", 0.4073567899, 0.3627791159),
        ((2, 3, 25, 42), "reflect", 0.4925277309, 0.3612757934),
        ((1, 2, 5, 7), "renorm", 0.4148141294, 0.3450983941),
        ((1, 2, 7, 11), "renorm", 0.4123719841, 0.3578701176),
        ((2, 3, 25, 42), "renorm", 0.4927644212, 0.3609179448),
    ],
)
def test_integer_maps_with_min_max(shape, border, loss, total):
    s, t = integer_maps(shape)
    s = 4 * s - 1
    assert ssim_loss(s, t, border=border).item() == pytest.approx(loss, abs=1e-9)
    assert ssim_loss(s.float(), t.float(), border=border).item() == pytest.approx(loss, abs=1e-6)
    g = gradient(s, t, border=border)
    assert g.abs().sum().item() == pytest.approx(total, abs=1e-9)
    assert g.sum((2, 3)).abs().max() < 1e-12
    assert (g * s).sum((2, 3)).abs().max() < 1e-8


def test_inverted_map_with_min_max():
    _, t = integer_maps((1, 2, 7, 11))
    assert ssim_loss(-t, t).item() == pytest.approx(0.9888234307, abs=1e-9)


# --- parity with the slow loop ---


@pytest.mark.parametrize("exponents", ALL_TERMS)
@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
@pytest.mark.parametrize("window", ["gaussian", "box"])
def test_map_equals_the_slow_loop(border, window, exponents):
    s, t = random_maps((1, 1, 5, 6))
    options = {"border": border, "window": window, "exponents": exponents, "window_size": 5}
    expected = slow_ssim(s.numpy(), t.numpy(), **options)
    ssim = ssim_map(s, t, normalize="none", **options)
    np.testing.assert_allclose(ssim.numpy(), expected, atol=1e-6)
    loss = ssim_loss(s, t, normalize="none", **options)
    assert loss.item() == pytest.approx((1 - ssim.mean().item()) / 2, abs=1e-12)


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (6, 6), (20, 3)])
def test_small_maps_equal_the_slow_loop(border, size):
    s, t = random_maps((1, 1, *size))
    expected = slow_ssim(s.numpy(), t.numpy(), border=border, sigma=2.0)
    ssim = ssim_map(s, t, normalize="none", border=border, sigma=2.0)
    np.testing.assert_allclose(ssim.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
def test_blocks_of_large_maps_meet_without_seams(border):
    # 70 positions are cut into four blocks; a long thin map keeps the loop short.
    for size in ((70, 11), (11, 70)):
        s, t = random_maps((1, 1, *size))
        expected = slow_ssim(s.numpy(), t.numpy(), border=border)
        ssim = ssim_map(s, t, normalize="none", border=border)
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
    expected = ssim_loss(*scaled, normalize="none")
    torch.testing.assert_close(ssim_loss(s, t, normalize=per), expected, rtol=0, atol=1e-12)


# --- gradients ---


@pytest.mark.parametrize("normalize", ["channel", "none"])
@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (4, 11), (5, 7), (6, 6)])
def test_gradcheck_sizes(size, border, normalize):
    s, t = random_maps((1, 2, *size))
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ssim_loss(x, t, border=border, normalize=normalize), (s,)
    )


@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
@pytest.mark.parametrize("window", ["gaussian", "box"])
def test_gradcheck_blocks(border, window):
    s, t = random_maps((2, 2, 25, 42))
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ssim_loss(x, t, border=border, window=window, chunk_elements=1),
        (s,),
        fast_mode=True,
    )


@pytest.mark.parametrize("exponents", ALL_TERMS)
@pytest.mark.parametrize("normalize", ["channel", "image", "level", "none"])
def test_gradcheck_terms_and_normalisations(normalize, exponents):
    s, t = random_maps((2, 2, 4, 5))
    s.requires_grad_()
    options = {"normalize": normalize, "exponents": exponents, "window_size": 5}
    assert torch.autograd.gradcheck(lambda x: ssim_loss(x, t, **options), (s,))


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("normalize", ["channel", "image", "level", "none"])
def test_gradcheck_mask(normalize, border):
    s, t = random_maps((2, 2, 4, 5))
    mask = torch.zeros(2, 1, 4, 5)
    mask[0, 0, :3, :4] = 1
    mask[1, 0, :4, :2] = 1
    mask[1, 0, 1, 1] = 0
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ssim_loss(x, t, normalize=normalize, border=border, mask=mask), (s,)
    )


@pytest.mark.parametrize("per", ["channel", "image", "level"])
def test_gradcheck_min_max(per):
    s, _ = random_maps((2, 2, 3, 4))
    s.requires_grad_()
    mask = torch.ones(2, 1, 3, 4)
    mask[0, 0, 2] = 0
    assert torch.autograd.gradcheck(lambda x: min_max_normalize(x, per=per), (s,))
    assert torch.autograd.gradcheck(lambda x: min_max_normalize(x, per=per, mask=mask), (s,))


def test_fused_min_max_equals_autograd_through_min_max():
    s, t = random_maps((2, 3, 13, 21))
    s[0, 0] = (s[0, 0] * 4).round() / 4  # many positions share the extremes
    for per in ("channel", "image", "level"):
        leaf = s.clone().requires_grad_()
        scaled = min_max_normalize(leaf, per=per)
        ssim_loss(scaled, min_max_normalize(t, per=per), normalize="none").backward()
        fused = gradient(s, t, normalize=per)
        torch.testing.assert_close(fused, leaf.grad, rtol=0, atol=1e-14)


def test_gradient_scales_with_upstream_and_survives_a_second_backward():
    s, t = random_maps((1, 2, 7, 11))
    expected = gradient(s, t)
    leaf = s.clone().requires_grad_()
    loss = ssim_loss(leaf, t) * 3
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * expected)


def test_teacher_gets_no_gradient():
    s, t = random_maps((1, 2, 7, 11))
    s.requires_grad_(), t.requires_grad_()
    ssim_loss(s, t).backward()
    assert s.grad is not None and t.grad is None
    assert not ssim_map(s, t).requires_grad
    with torch.no_grad():
        assert not ssim_loss(s, t).requires_grad


def test_one_map_is_kept_for_backward():
    s, t = (x.float() for x in random_maps((2, 8, 25, 42)))
    s.requires_grad_()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = ssim_loss(s, t)
    own = {x.untyped_storage().data_ptr() for x in (s, t)}
    beyond = sum(size for pointer, size in kept.items() if pointer not in own)
    assert 0 < beyond <= s.numel() * s.element_size()
    loss.backward()


# --- dead channels, masks ---


def test_dead_channels_are_zero_without_gradient():
    s, t = random_maps((1, 3, 7, 11))
    s[0, 0] = 5.0
    s[0, 1] = 5.0 + 1e-4 * s[0, 1]
    g = gradient(s, t)
    assert torch.equal(g[0, :2], torch.zeros(2, 7, 11).double()) and g[0, 2].abs().max() > 0
    assert torch.equal(min_max_normalize(s)[0, :2], torch.zeros(2, 7, 11).double())
    assert gradient(s, t, dead_range=1e-6)[0, 1].abs().max() > 0
    # A dead teacher channel is compared as zero, and pulls no gradient to infinity.
    assert torch.isfinite(gradient(t, s)).all()


def padded(x: Tensor, bottom: int, right: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, right, 0, bottom), value=value)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["reflect", "renorm"]),
    st.sampled_from(["channel", "image", "level", "none"]),
)
def test_masked_padding_changes_nothing(h, w, bottom, right, border, normalize):
    s, t = random_maps((2, 2, h, w))
    options = {"border": border, "normalize": normalize}
    mask = padded(torch.ones(2, 1, h, w), bottom, right, 0.0)
    s_pad, t_pad = padded(s, bottom, right, 7.0), padded(t, bottom, right, -3.0)
    expected = ssim_loss(s, t, **options)
    torch.testing.assert_close(ssim_loss(s_pad, t_pad, mask=mask, **options), expected)
    g = gradient(s_pad, t_pad, mask=mask, **options)
    torch.testing.assert_close(g, padded(gradient(s, t, **options), bottom, right, 0.0))


def test_mask_leaves_positions_out_of_the_mean():
    s, t = random_maps((2, 3, 8, 9))
    mask = torch.ones(2, 1, 8, 9, dtype=torch.bool)
    mask[:, :, 2:4, 3:5] = False
    ssim = ssim_map(s, t, normalize="none")
    expected = (1 - ssim[mask.expand_as(ssim)].mean()) / 2
    torch.testing.assert_close(ssim_loss(s, t, normalize="none", mask=mask), expected)


def test_images_of_different_extent_in_one_batch():
    s, t = random_maps((2, 2, 9, 12))
    mask = torch.zeros(2, 1, 9, 12)
    mask[0, 0, :6, :12] = 1
    mask[1, 0, :9, :8] = 1
    alone = [
        ssim_loss(s[n : n + 1, :, :h, :w], t[n : n + 1, :, :h, :w])
        for n, (h, w) in enumerate(((6, 12), (9, 8)))
    ]
    torch.testing.assert_close(ssim_loss(s, t, mask=mask), sum(alone) / 2)  # 72 positions each


def test_nothing_to_compare_is_an_attached_zero():
    s, t = random_maps((2, 3, 4, 5))
    s.requires_grad_()
    loss = ssim_loss(s, t, mask=torch.zeros(2, 1, 4, 5))
    loss.backward()
    assert loss.item() == 0 and torch.equal(s.grad, torch.zeros_like(s))
    empty = torch.zeros(0, 3, 4, 5, requires_grad=True)
    loss = ssim_loss(empty, empty.detach())
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == empty.shape


# --- invariants ---


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(2, 20),
    st.integers(2, 20),
    st.floats(0.1, 20),
    st.floats(-10, 10),
    st.integers(0, 1000),
)
def test_invariants(n, c, h, w, scale, shift, seed):
    s, t = random_maps((n, c, h, w), seed)
    loss = ssim_loss(s, t)
    assert -1e-12 <= loss.item() <= 1
    # Not exactly: 1e-6 is added to a range of 0.1 or more.
    assert ssim_loss(scale * t + shift, t).item() < 1e-9
    torch.testing.assert_close(ssim_loss(scale * s + shift, t), loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ssim_loss(s.flip(2, 3), t.flip(2, 3)), loss)
    torch.testing.assert_close(ssim_loss(s.mT, t.mT), loss)
    torch.testing.assert_close(ssim_loss(t, s), loss)
    torch.testing.assert_close(
        sum(ssim_loss(s[:, k : k + 1], t[:, k : k + 1]) for k in range(c)) / c, loss
    )
    g = gradient(s, t)
    assert g.sum((2, 3)).abs().max() < 1e-12 and (g * s).sum((2, 3)).abs().max() < 1e-4


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4000), st.booleans())
def test_chunks_change_nothing(elements, masked):
    s, t = random_maps((3, 5, 7, 11))
    mask = (torch.arange(11) < 8).expand(3, 1, 7, 11) if masked else None
    for normalize in ("channel", "level"):
        whole, parts = (
            {"normalize": normalize, "mask": mask, "chunk_elements": k} for k in (None, elements)
        )
        torch.testing.assert_close(
            ssim_loss(s, t, **parts), ssim_loss(s, t, **whole), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            gradient(s, t, **parts), gradient(s, t, **whole), rtol=0, atol=1e-14
        )
    torch.testing.assert_close(ssim_map(s, t, chunk_elements=elements), ssim_map(s, t))


# --- precision and layout ---


def test_autocast_changes_nothing():
    s, t = (x.float() for x in random_maps((2, 3, 25, 42)))
    plain, plain_grad = ssim_loss(s, t), gradient(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grad = ssim_loss(s, t), gradient(s, t)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(cast_grad, plain_grad)


def test_low_precision_matrix_products_are_not_used_and_the_setting_is_kept():
    s, t = (x.float() for x in random_maps((2, 3, 25, 42)))
    plain = ssim_loss(s, t)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(ssim_loss(s, t), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    s, t = (x.to(dtype) for x in random_maps((1, 2, 13, 21)))
    loss = ssim_loss(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ssim_loss(s.double(), t.double()).item(), abs=1e-6)
    assert gradient(s, t).dtype == dtype
    # Below the smallest float16 until the loss scale is on it.
    leaf = (s + 0).requires_grad_()
    (ssim_loss(leaf, t) * 2**16).backward()
    wide = gradient(s.double(), t.double())
    torch.testing.assert_close(leaf.grad.double() / 2**16, wide, rtol=1e-2, atol=1e-6)


def test_float32_keeps_its_digits_on_large_offsets():
    # E[x^2] - mu^2 without centring would lose the variance of 1e-4 beside a mean of 1.
    s, t = random_maps((1, 2, 32, 32))
    s, t = 0.99 + 0.01 * s, 0.99 + 0.01 * t
    wide = gradient(s, t, normalize="none")
    single = gradient(s.float(), t.float(), normalize="none").double()
    exact = gradient(s.float().double(), t.float().double(), normalize="none")
    assert (single - exact).norm() < 1e-4 * wide.norm()


def test_channels_last_equals_contiguous():
    s, t = random_maps((2, 6, 7, 11))
    for elements in (77 * 2, None):
        options = {"chunk_elements": elements}
        last = [x.contiguous(memory_format=torch.channels_last) for x in (s, t)]
        torch.testing.assert_close(ssim_loss(*last, **options), ssim_loss(s, t, **options))
        torch.testing.assert_close(gradient(*last, **options), gradient(s, t, **options))
        torch.testing.assert_close(ssim_map(*last, **options), ssim_map(s, t, **options))


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"border": "valid"}, r"11x11.*found 7x12"),
        ({"border": "zero"}, r"border='zero'.*reflect"),
        ({"window": "disc"}, r"window='disc'"),
        ({"normalize": "batch"}, r"normalize='batch'.*level"),
        ({"window_size": 4}, r"odd.*found 4"),
        ({"sigma": 0.0}, r"sigma positive"),
        ({"exponents": (0, 0, 0)}, r"nothing to compare"),
        ({"exponents": (1, 2, 1)}, r"\(1, 2, 1\)"),
        ({"chunk_elements": 0}, r"chunk_elements.*found 0"),
        ({"k2": 0.0}, r"must not be 0"),
        ({"mask": torch.ones(1, 7, 12)}, r"\(1, 1, 7, 12\), found \(1, 7, 12\)"),
        (
            {"mask": torch.ones(1, 1, 7, 12), "border": "valid", "window_size": 3},
            r"mask needs border",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    x = torch.rand(1, 2, 7, 12)
    with pytest.raises(ValueError, match=message):
        ssim_loss(x, x, **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2, 7, 12\) and \(1, 3, 7, 12\)"):
        ssim_loss(torch.rand(1, 2, 7, 12), torch.rand(1, 3, 7, 12))
    with pytest.raises(ValueError, match="min-max per 'none'"):
        min_max_normalize(torch.rand(1, 2, 7, 12), per="none")
