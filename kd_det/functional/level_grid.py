"""
The positions of a feature pyramid as plain geometry: where they lie, on which image, in which box.

Level l is an H_l x W_l grid whose cell (row, column) stands at the image point
((column + offset) * stride, (row + offset) * stride). The positions of all levels are counted
through, level by level and row by row: R = sum of H_l * W_l. Since a box holds a rectangle of cells
on every level, the positions inside it follow from its four sides, without testing all R.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.boxes import strictly_between

# Strides within this relative distance are the same: sizes are rounded up to whole cells.
_SAME_STRIDE = 0.02


class Grid(NamedTuple):
    """
    The grid of one pyramid level.

    Args:
        height, width: cells of the map.
        stride: pixels from one cell to the next.
        offset: place of a position in its cell as a fraction of the stride: 0.5 is its centre
            (FCOS), 0 its corner (anchors of Detectron2's RetinaNet).
    """

    height: int
    width: int
    stride: float
    offset: float = 0.5

    def columns(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the x coordinates of the columns in pixels, (W,) float64."""
        steps = torch.arange(self.width, dtype=torch.float64, device=device)
        return (steps + self.offset) * self.stride

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the y coordinates of the rows in pixels, (H,) float64."""
        steps = torch.arange(self.height, dtype=torch.float64, device=device)
        return (steps + self.offset) * self.stride


def same_stride(a: float, b: float) -> bool:
    """Tell whether levels of these two strides, in the same pixels, lie on one grid."""
    return abs(math.log2(a / b)) <= math.log2(1 + _SAME_STRIDE)


def count_positions(grids: Sequence[Grid]) -> int:
    """Return R, the number of positions of all levels."""
    return sum(grid.height * grid.width for grid in grids)


def grid_positions(grids: Sequence[Grid], device: torch.device | str = "cpu") -> Tensor:
    """Return the image points (x, y) of all positions in pixels, (R, 2) float64."""
    points = [
        torch.cartesian_prod(grid.rows(device), grid.columns(device)).flip(1) for grid in grids
    ]
    return torch.cat(points)


def split_levels(values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Cut values of all positions, (N, R), into one (N, H_l, W_l) view per level."""
    parts = values.split([grid.height * grid.width for grid in grids], dim=1)
    shapes = zip(parts, grids, strict=True)
    return [part.unflatten(1, (grid.height, grid.width)) for part, grid in shapes]


def cells_on_images(grid: Grid, image_sizes: Tensor) -> Tensor:
    """
    Mark the cells whose position lies on the image itself, not on the padding of its batch.

    Args:
        grid: of a level of the padded batch. With offset 0.5 a cell counts if its centre is on the
            image, with offset 0 if any part of it is.
        image_sizes: (N, 2) height and width of every image in pixels before padding.

    Returns:
        (N, H, W) bool on the device of the sizes.
    """
    rows = grid.rows(image_sizes.device) < image_sizes[:, :1]
    columns = grid.columns(image_sizes.device) < image_sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def positions_in_images(
    grids: Sequence[Grid],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    Do as `cells_on_images` does for all levels at once.

    Args:
        grids: of all levels of the padded batch.
        image_sizes: (height, width) of every image in pixels before padding, N of them.
        device: where the result goes.

    Returns:
        (N, R) bool.
    """
    sizes = torch.tensor(image_sizes, dtype=torch.float64).reshape(-1, 2)
    sizes = to_device(sizes, device)
    return torch.cat([cells_on_images(grid, sizes).flatten(1) for grid in grids], dim=1)


def positions_in_boxes(
    grids: Sequence[Grid], boxes: Tensor, valid: Tensor, radius: float = math.inf
) -> Tensor:
    """
    Mark the positions that lie strictly inside at least one box of their image.

    Args:
        grids: of all levels.
        boxes: (N, M, 4) corners x0, y0, x1, y1 in pixels, padded to the largest M of the batch.
        valid: (N, M) bool, False for padding.
        radius: in x and in y, a position is also strictly nearer to the centre of that box than
            this many strides of its level (1.5 is FCOS's centre sampling).

    Returns:
        (N, R) bool on the device of the boxes.
    """
    left, top, right, bottom = boxes.double()[..., None].unbind(2)  # (N, M, 1) each
    center_x, center_y = (left + right) / 2, (top + bottom) / 2
    covered = []
    for grid in grids:
        x, y = grid.columns(boxes.device), grid.rows(boxes.device)
        reach = radius * grid.stride
        low, high = (center_x - reach).maximum(left), (center_x + reach).minimum(right)
        in_x = strictly_between(x, low, high)  # (N, M, W)
        low, high = (center_y - reach).maximum(top), (center_y + reach).minimum(bottom)
        in_y = strictly_between(y, low, high) & valid[..., None]
        # The number of boxes over each cell; autocast may round it, but never to zero.
        boxes_over_cell = in_y.float().transpose(1, 2) @ in_x.float()  # (N, H, W)
        covered.append((boxes_over_cell > 0).flatten(1))
    return torch.cat(covered, dim=1)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to a device; from pinned memory, so that CUDA's queue is not waited for."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
