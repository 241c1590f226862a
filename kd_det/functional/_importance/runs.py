"""
Which positions of a pyramid may belong to which box, without testing all of them.

A box holds a rectangle of cells on every level, so the positions inside it follow from its four
sides: as runs of consecutive positions, of which pairs of a box and a position are made on the
device.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.boxes import strictly_between
from kd_det.functional.level_grid import Grid, count_positions, to_device


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


def runs_of_boxes(grids: Sequence[Grid], boxes: Tensor) -> Runs:
    """
    Find the positions strictly inside each box.

    Args:
        grids: of all levels.
        boxes: (B, 4) corners in pixels, on the CPU: the sizes of what follows depend on them, and
            asking an accelerator for a size would stall it. NaN or inverted boxes hold nothing.

    Returns:
        The runs of all boxes, on the CPU.
    """
    left, top, right, bottom = boxes.double().unbind(1)
    first_of_level, rectangles = 0, []
    for grid in grids:
        x, width = _range_between(grid.columns(), left, right)
        y, height = _range_between(grid.rows(), top, bottom)
        first = first_of_level + y * grid.width + x
        height = torch.where(width > 0, height, 0)
        rectangles.append((first, width, height, torch.full_like(x, grid.width)))
        first_of_level += grid.height * grid.width
    # Boxes outermost, so that the runs of one box follow each other.
    first, width, height, pitch = (
        torch.stack(column, dim=1).flatten() for column in zip(*rectangles, strict=True)
    )
    rectangle = torch.repeat_interleave(height)
    row = torch.arange(len(rectangle)) - (height.cumsum(0) - height)[rectangle]
    return Runs(
        owner=rectangle // len(grids),
        first=first[rectangle] + row * pitch[rectangle],
        length=width[rectangle],
    )


def runs_of_everything(grids: Sequence[Grid], num_boxes: int) -> Runs:
    """Give all positions of all levels to each of B boxes, as one run."""
    owner = torch.arange(num_boxes)
    return Runs(owner, torch.zeros_like(owner), torch.full_like(owner, count_positions(grids)))


def chunks_of_boxes(runs: Runs, max_pairs: int) -> Iterator[tuple[Runs, Tensor]]:
    """
    Cut runs into parts of whole boxes.

    Args:
        runs: of boxes 0, 1, ..., each of which has at least one.
        max_pairs: a part has no more pairs of a box and a position, but for those of its last box.

    Yields:
        The runs of consecutive boxes, and the number of pairs of each of these boxes, (B,).
    """
    num_boxes = int(runs.owner[-1]) + 1 if len(runs.owner) else 0
    counts = torch.zeros(num_boxes, dtype=torch.int64).index_add(0, runs.owner, runs.length)
    chunk = counts.cumsum(0) // max_pairs
    num_boxes_in, num_runs_in = (
        torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        for ids in (chunk, chunk[runs.owner])
    )
    parts = zip(*(tensor.split(num_runs_in) for tensor in runs), strict=True)
    yield from zip((Runs(*part) for part in parts), counts.split(num_boxes_in), strict=True)


def _range_between(coordinates: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first coordinate between low and high and their number, (B,) each."""
    between = strictly_between(coordinates, low[:, None], high[:, None])
    return between.int().argmax(1), between.sum(1)
