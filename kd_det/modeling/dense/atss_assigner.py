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

from kd_det.functional.atss import atss_assign


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
