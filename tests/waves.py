"""Small maps whose numbers anybody can write down, for the test vectors of the methods."""

from collections.abc import Callable

import torch
from torch import Tensor

# Standard images of 32 x 40 and 24 x 20 pixels, padded to the first, at stride 8.
SIZES = ((32, 40), (24, 20))


def wave(shape: tuple[int, ...], a: float, f: float, p: float) -> Tensor:
    """Return float64 numbers, element q (row by row, from 0) being a * sin(f * q + p)."""
    count = torch.Size(shape).numel()
    return (a * torch.sin(f * torch.arange(count, dtype=torch.float64) + p)).reshape(shape)


def standard_pair() -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's map, (2, 3, 4, 5)."""
    return wave((2, 3, 4, 5), 1, 0.1, 0), wave((2, 3, 4, 5), 1.2, 0.17, 0.3)


def centres_on(sizes: tuple[tuple[int, int], ...], grid: tuple[int, int], stride: float) -> Tensor:
    """Return (N, 1, H, W) float64: 1 where a cell's centre lies on an image of (height, width)."""
    mask = torch.zeros(len(sizes), 1, *grid, dtype=torch.float64)
    for n, (height, width) in enumerate(sizes):
        for i in range(grid[0]):
            for j in range(grid[1]):
                inside = (i + 0.5) * stride < height and (j + 0.5) * stride < width
                mask[n, 0, i, j] = float(inside)
    return mask


def standard_mask() -> Tensor:
    """Return the cells of the standard pair that lie on its images: all 20, and 3 x 2."""
    return centres_on(SIZES, (4, 5), 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed float64 numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_float32_whatever_autocast_says(
    loss: Callable[..., Tensor], student: Tensor, *others: Tensor, dtype: torch.dtype
) -> None:
    """
    Check that a loss of low-precision maps is that of the rounded maps, computed in float32.

    Args:
        loss: from student and others to a scalar.
        student: gets a gradient of its own type.
        others: rounded too.
        dtype: of the maps.
    """
    student = student.to(dtype)
    rounded = [x.to(dtype) for x in others]
    exact = loss(student.double(), *(x.double() for x in rounded))
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(leaf, *rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-6)
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad.any()
