"""Maps over images, as a grid of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F


def draw_grid(
    pictures: Sequence[Any],
    boxes: Sequence[Tensor],
    columns: Mapping[str, tuple[Tensor, float]],
    out: Path,
) -> None:
    """
    Draw one row per image: the image with its boxes, then each map over it.

    Args:
        pictures: RGB images, (H, W, 3) uint8.
        boxes: per image (M, 4) x0 y0 x1 y1 in its pixels.
        columns: title -> ((N, h, w) map in [0, 1], pixels per cell).
        out: PNG file.
    """
    rows, width = len(pictures), len(columns) + 1
    figure = Figure(figsize=(2.2 * width, 2.3 * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, width, squeeze=False)
    for row, (picture, own_boxes) in enumerate(zip(pictures, boxes, strict=True)):
        _show(axes[row, 0], picture, own_boxes)
        for axis, (values, stride) in zip(axes[row, 1:], columns.values(), strict=True):
            _show(axis, (picture * 0.35).astype(np.uint8), own_boxes)
            axis.imshow(
                _enlarged(values[row], stride, picture.shape[:2]),
                cmap="magma",
                alpha=0.75,
                vmin=0,
                vmax=1,
            )
    axes[0, 0].set_title("image", fontsize=9)
    for axis, title in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=130)


def _show(axis: Axes, picture: Any, boxes: Tensor) -> None:
    axis.imshow(picture)
    for x0, y0, x1, y1 in boxes.tolist():
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#4fd1c5", lw=0.8))
    axis.set_axis_off()


def _enlarged(values: Tensor, stride: float, size: tuple[int, int]) -> Any:
    """Return a map's values at the pixels of its image, cells as squares."""
    cells = values.float()[None, None]
    grid = (round(values.shape[0] * stride), round(values.shape[1] * stride))
    return F.interpolate(cells, size=grid, mode="nearest")[0, 0, : size[0], : size[1]].numpy()
