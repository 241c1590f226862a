"""
RepPoints (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019, arXiv
1904.11490): from points to boxes, and the two assignments of one image.

    box = m -+ d exp(lambda)     m, d: mean and standard deviation of the points' coordinates
                                 ("moment"; "minmax": the smallest box around the points,
                                 "partial_minmax": around the first four)
    first points: an object belongs to the level of trunc(log2 sqrt(w h / s^2)), s = 4, and there to
        the position nearest to its centre in widths and heights of the object
    refined points and classes: by the overlap of the boxes of the first points with the objects

A position that several objects want as their nearest goes to the nearest of them; the others have
none. An object takes, whatever the overlap, all positions of its highest one, if that is above 0.
"""

from typing import Literal

import torch
from torch import Tensor

from kd_det.functional.boxes import aligned_iou, box_centers

Transform = Literal["moment", "minmax", "partial_minmax"]

# Of a position that is neither an object's nor background.
IGNORED = -2

# A box is at least this wide and high, in pixels.
_SMALLEST_SIDE = 1e-6
_PARTIAL = 4


def points_to_boxes(points: Tensor, transform: Transform, spread: Tensor | None = None) -> Tensor:
    """
    Read a box off each set of points.

    Args:
        points: (..., 2 n), y and x of n >= 2 points alternating.
        transform: how, see above.
        spread: (2,) lambda, the logarithms of half width and half height in standard deviations,
            for "moment".

    Returns:
        (..., 4) corners x0, y0, x1, y1 in the unit of the points.
    """
    y, x = points.unflatten(-1, (-1, 2)).unbind(-1)
    xy = torch.stack([x, y], dim=-1)
    if transform == "moment":
        assert spread is not None
        middle = xy.mean(dim=-2)
        # The gradient of the norm is 0 where all points are equal, that of a root is not finite.
        norm = torch.linalg.vector_norm(xy - middle[..., None, :], dim=-2)
        half = norm / (xy.shape[-2] - 1) ** 0.5 * spread.exp()
        return torch.cat([middle - half, middle + half], dim=-1)
    if transform == "partial_minmax":
        xy = xy[..., :_PARTIAL, :]
    return torch.cat([xy.amin(dim=-2), xy.amax(dim=-2)], dim=-1)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, whose gradient arrives multiplied by the factor."""
    return factor * x + (1 - factor) * x.detach()


@torch.no_grad()
def assign_nearest(positions: Tensor, strides: Tensor, gt_boxes: Tensor, scale: float) -> Tensor:
    """
    Give each object the nearest position of its level.

    Args:
        positions: (R, 2) x and y in pixels.
        strides: (R,) of each position's level, powers of 2.
        gt_boxes: (M, 4) corners in pixels; M may be 0.
        scale: s; an object of side s 2^l belongs to level l, or to the nearest that there is.

    Returns:
        (R,) int64: index of each position's box, -1 where there is none.
    """
    if len(gt_boxes) == 0:
        return positions.new_full((len(positions),), -1, dtype=torch.int64)
    sides = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=_SMALLEST_SIDE)
    levels = strides.log2()
    wanted = (sides / scale).log2().mean(dim=1).trunc()
    gap = (levels[:, None] - wanted).abs()
    distance = ((positions[:, None] - box_centers(gt_boxes)) / sides).square().sum(dim=2).sqrt()
    distance = distance.where(gap == gap.amin(dim=0), torch.inf)
    # Both minima are the first ones: the lower position, the lower box.
    smallest, index = distance.min(dim=0)
    chosen = torch.full_like(distance, torch.inf)
    chosen.scatter_(0, index[None], smallest[None])
    best, matched = chosen.min(dim=1)
    return matched.where(best.isfinite(), -1)


@torch.no_grad()
def assign_by_overlap(boxes: Tensor, gt_boxes: Tensor, low: float, high: float) -> Tensor:
    """
    Assign positions by the overlap of their boxes with the objects.

    Args:
        boxes: (R, 4) corners in pixels.
        gt_boxes: (M, 4) corners in pixels; M may be 0.
        low, high: below the one, a position is background; from the other on, it is positive.

    Returns:
        (R,) int64: index of each position's box, -1 for background, `IGNORED` between the two.
    """
    if len(gt_boxes) == 0:
        return boxes.new_full((len(boxes),), -1, dtype=torch.int64)
    iou = aligned_iou(boxes[:, None], gt_boxes)
    best, matched = iou.max(dim=1)
    matched = matched.where(best >= high, IGNORED).where(best >= low, -1)
    top = iou.amax(dim=0)
    # Object by object: of those that take a position as their best, the last one has it.
    number = torch.arange(1, len(gt_boxes) + 1, device=iou.device)
    last = (number * ((iou == top) & (top > 0))).amax(dim=1)
    return torch.where(last > 0, last - 1, matched)
