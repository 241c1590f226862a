"""
Adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1) for one image.

For each ground-truth box g: the k anchors of every level whose centres are closest to g's centre
are its candidates; those with IoU >= mean + standard deviation of the candidates' IoU, and with
their centre inside g, are positive. An anchor that is positive for several boxes goes to the one it
overlaps most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.boxes import INSIDE_MARGIN, aligned_iou, box_centers, strictly_inside

# Candidates of equal IoU (a box that contains them all) must not fall below their mean by rounding.
_ROUNDING = 1e-6


class Candidates(NamedTuple):
    """
    The anchors that each of M boxes chooses from, C of them.

    Args:
        anchor: (C, M) int64 into the anchors of all levels.
        iou: (C, M) in [0, 1], or the quality that stands in its place.
        threshold: (M,), mean plus standard deviation of it.
    """

    anchor: Tensor
    iou: Tensor
    threshold: Tensor


@torch.no_grad()
def find_candidates(
    anchors: Sequence[Tensor],
    gt_boxes: Tensor,
    topk: int = 9,
    *,
    quality: Tensor | None = None,
) -> Candidates:
    """
    Find the candidates of the boxes of one image.

    Args:
        anchors: per level, (R_l, 4) corners in pixels.
        gt_boxes: (M, 4) corners in pixels, M >= 1.
        topk: candidates per box and level; levels with fewer anchors give all they have.
        quality: (R, M) in [0, 1], what each anchor is to each box in place of their IoU.

    Returns:
        The candidates.
    """
    index = _nearest_per_level(anchors, gt_boxes, topk)
    if quality is None:
        iou = aligned_iou(torch.cat(list(anchors))[index], gt_boxes)
    else:
        iou = quality.gather(0, index)
    # The sample standard deviation (divisor n - 1), as the authors' results were made with; one
    # candidate alone has none.
    spread = iou.std(dim=0, correction=min(1, len(iou) - 1))
    return Candidates(index, iou, iou.mean(dim=0) + spread)


@torch.no_grad()
def atss_assign(anchors: Sequence[Tensor], gt_boxes: Tensor, topk: int = 9) -> Tensor:
    """
    Assign anchors to the ground truth of one image.

    Args:
        anchors: per level, (R_l, 4) corners in pixels.
        gt_boxes: (M, 4) corners in pixels; M may be 0.
        topk: candidates per box and level; levels with fewer anchors give all they have.

    Returns:
        (R,) int64, R the sum of R_l: index of each anchor's box, -1 for background.
    """
    boxes = torch.cat(list(anchors))
    if len(gt_boxes) == 0:
        return boxes.new_full((len(boxes),), -1, dtype=torch.int64)
    return match_candidates(boxes, gt_boxes, find_candidates(anchors, gt_boxes, topk))


@torch.no_grad()
def match_candidates(
    anchors: Tensor, gt_boxes: Tensor, candidates: Candidates, margin: float = INSIDE_MARGIN
) -> Tensor:
    """
    Choose the positives among the candidates.

    Args:
        anchors: of all levels, (R, 4).
        gt_boxes: (M, 4), M >= 1.
        candidates: of these boxes.
        margin: pixels from each side of the box within which a centre is not inside.

    Returns:
        (R,) int64: index of each anchor's box, -1 for background.
    """
    positive = candidates.iou + _ROUNDING >= candidates.threshold
    positive &= strictly_inside(box_centers(anchors[candidates.anchor]), gt_boxes, margin)
    # A column holds no anchor twice, so the scatter has one value per place.
    overlap = candidates.iou.new_full((len(anchors), len(gt_boxes)), -1.0)
    overlap.scatter_(0, candidates.anchor, candidates.iou.where(positive, -1.0))
    best, matched = overlap.max(dim=1)
    return matched.where(best >= 0, -1)


def _nearest_per_level(anchors: Sequence[Tensor], gt_boxes: Tensor, topk: int) -> Tensor:
    """Return (C, M) indices, into all levels together, of each box's candidates."""
    targets = box_centers(gt_boxes)
    found, start = [], 0
    for level in anchors:
        squared = (box_centers(level)[:, None] - targets).square().sum(dim=2)
        k = min(topk, len(level))
        found.append(squared.topk(k, dim=0, largest=False).indices + start)
        start += len(level)
    return torch.cat(found)
