"""Overlap of boxes that belong together one to one (or by broadcasting), as box losses need it."""

import torch
from torch import Tensor


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
        boxes: (..., 4) corners x1, y1, x2, y2, with x1 <= x2 and y1 <= y2.
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
        boxes: (..., 4) corners x1, y1, x2, y2, with x1 <= x2 and y1 <= y2.
        others: (..., 4), broadcast against `boxes`.
        eps: smallest area, in squared units, that is divided by.

    Returns:
        (...) values in (-1, 1]; 1 iff the boxes are equal. The loss is 1 minus this.
    """
    intersection, union = _intersection_and_union(boxes, others)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    enclosing = (high - low).prod(dim=-1)
    penalty = (enclosing - union) / enclosing.clamp(min=eps)
    return intersection / union.clamp(min=eps) - penalty
