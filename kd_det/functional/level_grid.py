"""
The positions of a feature pyramid as plain geometry: where they lie, and which of them a box holds.

Level l is an H_l x W_l grid whose cell (row, column) stands at the image point
((column + offset) * stride, (row + offset) * stride). The positions of all levels are counted
through, level by level and row by row: R = sum of H_l * W_l. Since a box holds a rectangle of cells
on every level, the positions inside it follow from its four sides, without testing all R.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.boxes import strictly_between


class Level(NamedTuple):
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


def count_positions(levels: Sequence[Level]) -> int:
    """Return R, the number of positions of all levels."""
    return sum(level.height * level.width for level in levels)


def grid_positions(levels: Sequence[Level], device: torch.device | str = "cpu") -> Tensor:
    """Return the image points (x, y) of all positions in pixels, (R, 2) float64."""
    points = [
        torch.cartesian_prod(level.rows(device), level.columns(device)).flip(1) for level in levels
    ]
    return torch.cat(points)


def split_levels(values: Tensor, levels: Sequence[Level]) -> list[Tensor]:
    """Cut values of all positions, (N, R), into one (N, H_l, W_l) view per level."""
    parts = values.split([level.height * level.width for level in levels], dim=1)
    shapes = zip(parts, levels, strict=True)
    return [part.unflatten(1, (level.height, level.width)) for part, level in shapes]


def positions_in_images(
    levels: Sequence[Level],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    Mark the positions that lie on the image itself, not on the padding of its batch.

    Args:
        levels: the grids of the padded batch.
        image_sizes: (height, width) of every image in pixels before padding, N of them.
        device: where the result goes.

    Returns:
        (N, R) bool.
    """
    sizes = torch.tensor(image_sizes, dtype=torch.float64).reshape(-1, 2).flip(1)
    sizes = to_device(sizes, device)
    return (grid_positions(levels, device) < sizes[:, None]).all(2)


def positions_in_boxes(levels: Sequence[Level], boxes: Tensor, valid: Tensor) -> Tensor:
    """
    Mark the positions that lie strictly inside at least one box of their image.

    Args:
        levels: the grids.
        boxes: (N, M, 4) corners x0, y0, x1, y1 in pixels, padded to the largest M of the batch.
        valid: (N, M) bool, False for padding.

    Returns:
        (N, R) bool on the device of the boxes.
    """
    left, top, right, bottom = boxes.double()[..., None].unbind(2)  # (N, M, 1) each
    covered = []
    for level in levels:
        x, y = level.columns(boxes.device), level.rows(boxes.device)
        in_x = strictly_between(x, left, right)  # (N, M, W)
        in_y = strictly_between(y, top, bottom) & valid[..., None]
        # The number of boxes over each cell; autocast may round it, but never to zero.
        boxes_over_cell = in_y.float().transpose(1, 2) @ in_x.float()  # (N, H, W)
        covered.append((boxes_over_cell > 0).flatten(1))
    return torch.cat(covered, dim=1)


class Runs(NamedTuple):
    """
    The positions of B boxes, as runs of consecutive positions: one per row of cells and level.

    Args:
        owner: box of each run, ascending, int64.
        first: index in 0..R-1 of the run's first position, int64.
        length: positions in the run, at least 1, int64.
    """

    owner: Tensor
    first: Tensor
    length: Tensor

    def to(self, device: torch.device | str) -> "Runs":
        """Copy the runs to a device without waiting for it."""
        return Runs(*(to_device(tensor, device) for tensor in self))

    def pairs(self, total: int) -> tuple[Tensor, Tensor]:
        """
        List every pair of a box and one of its positions.

        Args:
            total: the sum of `length`, known to the host so that no accelerator has to be asked.

        Returns:
            The box and the position of each pair, ordered by box: (total,) int64 each.
        """
        runs = torch.arange(len(self.length), device=self.length.device)
        run = torch.repeat_interleave(runs, self.length, output_size=total)
        start = self.length.cumsum(0) - self.length
        pair = torch.arange(total, device=run.device)
        return self.owner.index_select(0, run), (self.first - start).index_select(0, run) + pair


def runs_of_boxes(levels: Sequence[Level], boxes: Tensor) -> Runs:
    """
    Find the positions strictly inside each box.

    Args:
        levels: the grids.
        boxes: (B, 4) corners in pixels, on the CPU: the sizes of what follows depend on them, and
            asking an accelerator for a size would stall it. NaN or inverted boxes hold nothing.

    Returns:
        The runs of all boxes, on the CPU.
    """
    left, top, right, bottom = boxes.double().unbind(1)
    first_of_level, rectangles = 0, []
    for level in levels:
        x, width = _range_between(level.columns(), left, right)
        y, height = _range_between(level.rows(), top, bottom)
        first = first_of_level + y * level.width + x
        height = torch.where(width > 0, height, 0)
        rectangles.append((first, width, height, torch.full_like(x, level.width)))
        first_of_level += level.height * level.width
    # Boxes outermost, so that the runs of one box follow each other.
    first, width, height, pitch = (
        torch.stack(column, dim=1).flatten() for column in zip(*rectangles, strict=True)
    )
    rectangle = torch.repeat_interleave(height)
    row = torch.arange(len(rectangle)) - (height.cumsum(0) - height)[rectangle]
    return Runs(
        owner=rectangle // len(levels),
        first=first[rectangle] + row * pitch[rectangle],
        length=width[rectangle],
    )


def runs_of_everything(levels: Sequence[Level], num_boxes: int) -> Runs:
    """Give all positions of all levels to each of B boxes, as one run."""
    owner = torch.arange(num_boxes)
    return Runs(owner, torch.zeros_like(owner), torch.full_like(owner, count_positions(levels)))


def _range_between(coordinates: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first coordinate between low and high and their number, (B,) each."""
    between = strictly_between(coordinates, low[:, None], high[:, None])
    return between.int().argmax(1), between.sum(1)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to a device; from pinned memory, so that CUDA's queue is not waited for."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
