"""Reducing images: sizes, values, cell centres."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional.resize import INTERPOLATIONS, reduce_image, reduced_size

quick = settings(max_examples=40, deadline=None)


def ramp(height: int, width: int) -> Tensor:
    """Channels hold the y and x of each pixel's centre; pixel 0 is centred at 0.5."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((96, 80), 2, (48, 40)),
        ((97, 81), 2, (49, 41)),
        ((97, 81), 4, (25, 21)),
        ((1, 1), 8, (1, 1)),
        ((75, 75), 1.5, (50, 50)),
        ((3, 10), 1.1, (3, 10)),
        ((33, 33), 1.1, (30, 30)),
        ((69, 69), 2.3, (30, 30)),  # 69 / 2.3 is 30.000000000000004
        ((21, 42), 1.4, (15, 30)),
    ],
)
def test_reduced_size(size: tuple[int, int], factor: float, expected: tuple[int, int]) -> None:
    assert reduced_size(*size, factor) == expected


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1.0, 1.25, 4 / 3, 1.5, 2.0, 2.2, 3.0, 4.0, 8.0]),
    st.sampled_from(INTERPOLATIONS),
)
@quick
def test_size_range_and_dtype(height: int, width: int, factor: float, mode: str) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    out = reduce_image(image, factor, mode)
    assert out.dtype == torch.uint8
    assert out.shape == (3, *reduced_size(height, width, factor))
    for was, now in zip(image, out, strict=True):
        assert was.min() <= now.min()
        assert now.max() <= was.max()


def test_nearest_takes_every_second_pixel_from_the_first() -> None:
    image = torch.arange(7).repeat(3, 5, 1)
    assert reduce_image(image, 2, "nearest")[0, 0].tolist() == [0, 2, 4, 6]
    assert reduce_image(image, 4, "nearest")[0, 0].tolist() == [0, 4]
    rows = torch.arange(6)[:, None].repeat(3, 1, 4)
    assert reduce_image(rows, 3, "nearest")[0, :, 0].tolist() == [0, 3]


def test_area_averages_what_a_cell_covers() -> None:
    image = torch.tensor([[[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]])
    assert reduce_image(image, 2, "area").tolist() == [[[2.5, 6.5]]]
    # The two rows that a cell of 4 x 4 lacks repeat the last one.
    assert reduce_image(image, 4, "area").tolist() == [[[(14 + 3 * 22) / 16]]]


def test_bilinear_is_antialiased() -> None:
    """Stripes become grey; without antialiasing a cell sees the middle pixels, here 0, alone."""
    stripes = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(3, 32, 8)
    out = reduce_image(stripes, 4, "bilinear")
    assert (out - 0.5).abs()[..., 1:-1].max() < 0.2


@pytest.mark.parametrize("mode", ["bilinear", "area"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_cell_centres_keep_their_place(mode: str, factor: int) -> None:
    """A cell of the small image shows what lies at its own centre: half-pixel convention."""
    out = reduce_image(ramp(64, 32), factor, mode)
    expected = ramp(64 // factor, 32 // factor) * factor
    inner = slice(1, -1)  # at the border the antialiasing filter is one-sided
    torch.testing.assert_close(out[:, inner, inner], expected[:, inner, inner])


def test_bilinear_keeps_places_at_a_factor_that_is_no_integer() -> None:
    out = reduce_image(ramp(60, 60), 1.5, "bilinear")
    expected = ramp(40, 40) * 1.5
    inner = slice(2, -2)
    # The triangle filter of a fractional factor is not symmetric about every cell.
    assert (out - expected)[:, inner, inner].abs().max() < 0.1
    assert abs((out - expected)[:, inner, inner].mean()) < 1e-3


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize("factor", [1.5, 2])
def test_batches_and_constant_images(mode: str, factor: float) -> None:
    images = torch.rand(2, 3, 9, 12)
    together = reduce_image(images, factor, mode)
    assert torch.equal(together, torch.stack([reduce_image(x, factor, mode) for x in images]))
    flat = torch.full((1, 9, 12), 7.25)
    torch.testing.assert_close(
        reduce_image(flat, factor, mode),
        torch.full((1, math.ceil(9 / factor), math.ceil(12 / factor)), 7.25),
    )


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_any_dtype(dtype: torch.dtype, mode: str) -> None:
    image = (torch.arange(60).reshape(1, 6, 10)).to(dtype)
    out = reduce_image(image, 2, mode)
    assert out.dtype == dtype
    exact = reduce_image(image.double(), 2, mode)
    atol = {torch.float64: 0, torch.float16: 0.05, torch.bfloat16: 0.3}.get(dtype, 0.5)
    assert (out.double() - exact).abs().max() <= atol + 1e-5


def test_integers_are_rounded_not_cut_off() -> None:
    image = torch.tensor([[[1, 2], [2, 2]]], dtype=torch.uint8)  # mean 1.75
    assert reduce_image(image, 2, "area").item() == 2


@pytest.mark.parametrize("mode", INTERPOLATIONS)
def test_factor_one_is_the_image_itself(mode: str) -> None:
    image = torch.rand(3, 4, 4)
    assert reduce_image(image, 1, mode) is image


def test_refuses() -> None:
    image = torch.rand(3, 4, 4)
    with pytest.raises(ValueError, match=r"factor of at least 1, found 0\.5"):
        reduce_image(image, 0.5, "area")
    with pytest.raises(ValueError, match=r"'cubic' is none of nearest, bilinear, area"):
        reduce_image(image, 2, "cubic")
