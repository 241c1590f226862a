"""
Adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

For each ground-truth box g: the k anchors of every level whose centres are closest to g's centre
are its candidates; those with IoU >= mean + standard deviation of the candidates' IoU, and with
their centre inside g, are positive. An anchor that is positive for several boxes goes to the one it
overlaps most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_det.functional.boxes import aligned_iou, box_centers, strictly_inside

# Candidates of equal IoU (a box that contains them all) must not fall below their mean by rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Positives:
    """
    The P anchors of a batch that have a box to predict.

    Args:
        index: (P,) into the N * R anchors of the batch, image by image, level by level.
        classes: (P,) their class.
        boxes: (P, 4) their ground truth, in pixels.
        anchors: (P, 4) themselves, in pixels.
    """

    index: Tensor
    classes: Tensor
    boxes: Tensor
    anchors: Tensor


@torch.no_grad()
def find_positives(
    anchors: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    *,
    topk: int,
) -> Positives:
    """
    Assign the anchors of a batch.

    Args:
        anchors: per level, (R_l, 4) corners in pixels, the same for all images.
        gt_boxes: per image, (M, 4) corners in pixels.
        gt_classes: per image, (M,).
        topk: candidates per box and level.

    Returns:
        The positives of all images.
    """
    matches, start = [], 0
    for boxes in gt_boxes:
        match = atss_assign(anchors, boxes, topk)
        matches.append(torch.where(match >= 0, match + start, match))
        start += len(boxes)
    matched = torch.cat(matches)
    # The one place that waits for the device: the number of positives decides the shapes to come.
    index = (matched >= 0).nonzero()[:, 0]
    chosen = matched[index]
    return Positives(
        index=index,
        classes=torch.cat(list(gt_classes))[chosen],
        boxes=torch.cat(list(gt_boxes))[chosen],
        anchors=torch.cat(list(anchors)).repeat(len(gt_boxes), 1)[index],
    )


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
    candidates = _nearest_per_level(anchors, gt_boxes, topk)
    ious = aligned_iou(boxes[candidates], gt_boxes)
    # The sample standard deviation (divisor n - 1), as the authors' results were made with; one
    # candidate alone has none.
    spread = ious.std(dim=0, correction=min(1, len(ious) - 1))
    positive = ious + _ROUNDING >= ious.mean(dim=0) + spread
    positive &= strictly_inside(box_centers(boxes[candidates]), gt_boxes)
    # A column holds no anchor twice, so the scatter has one value per place.
    overlap = ious.new_full((len(boxes), len(gt_boxes)), -1.0)
    overlap.scatter_(0, candidates, ious.where(positive, -1.0))
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
