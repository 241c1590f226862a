"""SSIM of maps whose values are known: closed forms and frozen reference values."""

import math

import pytest
import torch
from ssim_scenes import dissimilarity, gradient, random_maps, similarity
from torch import Tensor


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


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (4, 11), (7, 11), (32, 20)])
def test_constant_maps_have_the_closed_form(border, size):
    # Windows that lose mass at the border (zero padding) would give 0.1775778534 on 7x11.
    for a, b in ((0.5, 0.25), (0.0, 1.0), (0.0, 0.0)):
        s, t = (torch.full((1, 2, *size), x, dtype=torch.float64) for x in (a, b))
        expected = (1 - (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) / 2
        loss = dissimilarity(s, t, normalize="none", border=border)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_identical_maps_have_zero_loss_and_gradient():
    _, t = random_maps((2, 3, 13, 21))
    for normalize in ("none", "channel", "image", "level"):
        assert abs(dissimilarity(t, t, normalize=normalize).item()) < 1e-15
        assert abs(dissimilarity(t.float(), t.float(), normalize=normalize).item()) < 1e-7
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
    assert dissimilarity(s, t, normalize="none").item() == pytest.approx(loss, abs=1e-9)
    assert dissimilarity(s.float(), t.float(), normalize="none").item() == pytest.approx(
        loss, abs=1e-6
    )
    for k, expected in enumerate((luminance, contrast, structure)):
        exponents = tuple(int(k == m) for m in range(3))
        mean = similarity(s, t, normalize="none", exponents=exponents).mean().item()
        # Each deviation has 1e-7 C2 under its root, so single terms agree to a few 1e-8.
        assert mean == pytest.approx(expected, abs=1e-7 if k else 1e-9)


def test_checkerboard():
    t = checkerboard(0.25)
    half = dissimilarity(checkerboard(0.125), t, normalize="none").item()
    assert half == pytest.approx(0.0988611199, abs=1e-9)
    for s in (checkerboard(-0.25), t.roll(1, dims=3)):
        assert dissimilarity(s, t, normalize="none").item() == pytest.approx(0.9928514694, abs=1e-9)


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
    assert dissimilarity(s, t, **options).item() == pytest.approx(expected, abs=1e-9)
    single = dissimilarity(s.float(), t.float(), **options)
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
        loss = dissimilarity(s, t, normalize="none", exponents=exponents).item()
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
    assert dissimilarity(s, t, border=border).item() == pytest.approx(loss, abs=1e-9)
    assert dissimilarity(s.float(), t.float(), border=border).item() == pytest.approx(
        loss, abs=1e-6
    )
    g = gradient(s, t, border=border)
    assert g.abs().sum().item() == pytest.approx(total, abs=1e-9)
    assert g.sum((2, 3)).abs().max() < 1e-12
    assert (g * s).sum((2, 3)).abs().max() < 1e-8


def test_inverted_map_with_min_max():
    _, t = integer_maps((1, 2, 7, 11))
    assert dissimilarity(-t, t).item() == pytest.approx(0.9888234307, abs=1e-9)
