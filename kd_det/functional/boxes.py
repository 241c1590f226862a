"""
Geometry of boxes and points that belong together one to one (or by broadcasting).

A box is (x0, y0, x1, y1) in pixels with x0 <= x1 and y0 <= y1.
"""

import torch
from torch import Tensor

# A point is inside a box when its distance to each side is larger than this many pixels.
INSIDE_MARGIN = 1e-10


def box_centers(boxes: Tensor) -> Tensor:
    """Return the centres (..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def strictly_between(x: Tensor, low: Tensor, high: Tensor, margin: float = INSIDE_MARGIN) -> Tensor:
    """
    Tell which coordinates lie between two sides of a box, not on them.

    Args:
        x: coordinates in pixels.
        low, high: the sides, broadcast against x.
        margin: what is closer to a side than this, in pixels, lies on it.

    Returns:
        bool, of the common shape; False where a side is NaN or the sides are inverted.
    """
    return (x - low > margin) & (high - x > margin)


def strictly_inside(points: Tensor, boxes: Tensor, margin: float = INSIDE_MARGIN) -> Tensor:
    """
    Tell which points lie inside their box, not on its border.

    Args:
        points: (..., 2) x and y in pixels.
        boxes: (..., 4), broadcast against `points`.
        margin: what is closer to a side than this, in pixels, lies on it.

    Returns:
        (...) bool.
    """
    return strictly_between(points, boxes[..., :2], boxes[..., 2:], margin).all(-1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """
    How central each point is in its box (FCOS, Tian et al., ICCV 2019, eq. 3).

    Args:
        points: (P, 2), inside their boxes.
        boxes: (P, 4) corners.

    Returns:
        (P,) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)): 1 in the middle, 0 on the border.
    """
    low, high = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return ratio.prod(dim=1).sqrt()


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    sides = (high - low).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, _area(boxes) + _area(others) - intersection


def aligned_iou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """
    Intersection over union of each box with its partner.

    Args:
        boxes: (..., 4).
        others: (..., 4), broadcast against `boxes`.
        eps: smallest union, in squared units, that is divided by; keeps empty boxes at 0.

    Returns:
        (...) values in [0, 1].
    """
    intersection, union = _intersection_and_union(boxes, others)
    return intersection / union.clamp(min=eps)


def aligned_giou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """
    Generalised IoU of each box with its partner (Rezatofighi et al., CVPR 2019).

    IoU - (C - U) / C, where U is the area of the union and C that of the smallest enclosing box.

    Args:
        boxes: (..., 4).
        others: (..., 4), broadcast against `boxes`.
        eps: smallest area, in squared units, that is divided by.

    Returns:
        (...) values in (-1, 1]; 1 iff the boxes are equal. The loss is 1 minus this.
    """
    intersection, union = _intersection_and_union(boxes, others)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    sides = high - low
    enclosing = sides[..., 0] * sides[..., 1]  # the backward pass of prod() synchronises
    penalty = (enclosing - union) / enclosing.clamp(min=eps)
    return intersection / union.clamp(min=eps) - penalty


def boxes_around(points: Tensor, distances: Tensor) -> Tensor:
    """
    Return the boxes whose sides have these distances from their points.

    Args:
        points: (..., 2) x and y in pixels.
        distances: (..., 4) in pixels to the left, top, right and bottom side.

    Returns:
        (..., 4) corners in pixels.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def anchors_at(positions: Tensor, sizes: Tensor) -> Tensor:
    """
    Return the anchors of a level.

    Args:
        positions: (P, 2), x and y in pixels.
        sizes: (A, 2), width and height in pixels.

    Returns:
        (P * A, 4) corners, the anchors of a position next to each other.
    """
    centers, half = positions[:, None], sizes / 2
    return torch.cat([centers - half, centers + half], dim=2).flatten(0, 1)
