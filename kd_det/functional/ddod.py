"""
Assignment by what a detector predicts (DDOD: Chen et al., "Disentangle Your Dense Object Detector",
ACM MM 2021, arXiv 2107.02963), and the weights of its levels.

    q = p^(1 - xi) * IoU^xi     p: probability of the box's class, IoU: of the predicted box with it

computed twice, once for classification and once for boxes, with different exponents xi. Positive
positions have their centre inside the box, and

    "atss": are among the k nearest of their level, with q >= mean + deviation of these candidates
    "topk": have one of the k highest q of all levels together, above 0 (PGD's release)

A position that is positive for several boxes goes to the one of highest q.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_det.functional.atss import find_candidates, match_candidates
from kd_det.functional.boxes import aligned_iou, box_centers, strictly_inside
from kd_det.functional.gaussian_importance import prediction_quality

Assigner = Literal["atss", "topk"]

# A position is inside a box when it is further than this from each side, in pixels.
_MARGIN = 0.01


@torch.no_grad()
def prediction_qualities(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    exponents: Sequence[float],
) -> list[Tensor]:
    """
    Compute what each prediction of an image is worth to each object.

    Args:
        logits: (R, K) class logits.
        boxes: (R, 4) decoded boxes, corners in pixels.
        gt_boxes: (M, 4) corners in pixels.
        gt_classes: (M,) in 0 .. K - 1.
        exponents: xi, each in [0, 1].

    Returns:
        For each exponent (R, M) in [0, 1].
    """
    probability = logits[:, gt_classes].sigmoid()
    iou = aligned_iou(boxes[:, None], gt_boxes)
    return [prediction_quality(probability, iou, exponent) for exponent in exponents]


@torch.no_grad()
def assign_by_quality(
    anchors: Sequence[Tensor],
    gt_boxes: Tensor,
    quality: Tensor,
    *,
    assigner: Assigner,
    topk: int,
) -> Tensor:
    """
    Assign the positions of an image to its objects.

    Args:
        anchors: per level, (R_l, 4) corners in pixels, whose centres are the positions.
        gt_boxes: (M, 4) corners in pixels; M may be 0.
        quality: (R, M) in [0, 1], R the sum of R_l.
        assigner: how candidates are found, see above.
        topk: candidates per box, for "atss" on each level; fewer where there are fewer positions.

    Returns:
        (R,) int64: index of each position's box, -1 for background.
    """
    every = torch.cat(list(anchors))
    if len(gt_boxes) == 0:
        return every.new_full((len(every),), -1, dtype=torch.int64)
    if assigner == "atss":
        candidates = find_candidates(anchors, gt_boxes, topk, quality=quality)
        return match_candidates(every, gt_boxes, candidates, _MARGIN)
    best, index = quality.topk(min(topk, len(every)), dim=0)
    positive = (best > 0) & strictly_inside(box_centers(every)[index], gt_boxes, _MARGIN)
    # A column holds no position twice, so the scatter has one value per place.
    chosen = torch.zeros_like(quality).scatter_(0, index, best.where(positive, 0.0))
    highest, matched = chosen.max(dim=1)
    return matched.where(highest > 0, -1)


def level_factors(counts: Tensor) -> Tensor:
    """
    Weigh the levels by how few positives they have had.

    Args:
        counts: (..., L), positives of each level so far.

    Returns:
        (..., L) float32: 1 for the level with most, 2 for the one with fewest and, while all have
        the same, for every level.
    """
    counts = counts.double()
    low, high = counts.aminmax(dim=-1, keepdim=True)
    return (2 - (counts - low) / (high - low + 1e-10)).float()
