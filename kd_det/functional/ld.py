"""
The maths of LD: distil where the sides of a box may lie, on positives and on what is nearly one.

Paper: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022. Each side e
of a box is a distribution over bins 0 .. n, kl_e(tau) the divergence of the student's from the
teacher's at temperature tau. Main are the positives of ATSS with their thresholds t_g; the valuable
localisation region VLR holds the anchors with gamma t_g <= DIoU(anchor, g) < t_g for some box g.

    L_main = 2/N * 1/4  * sum_{Main} w_r sum_e tau^2 / (n + 1) kl_e    w_r = max_k sigmoid(z^S_rk)
    L_vlr  = 2/N * 1/16 * sum_{VLR}  v_r sum_e tau^2 / (n + 1) kl_e    v_r = largest IoU of those
    L_kd   = mean_{Main of a level} tau^2 / K sum_k q (log q - log p)  softmax over classes

The release has plain sums over the positives of its 2 images per process, divided by nothing; 2/N
keeps that scale for any batch. Its VLR routine fails for an image without boxes; here it is empty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.atss import find_candidates, match_candidates
from kd_det.functional.boxes import aligned_iou, box_centers
from kd_det.functional.divergence import softmax_divergence

# What the release multiplies the two regions' sums with.
MAIN_FACTOR = 1 / 4
VLR_FACTOR = 1 / 16


def localization_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    factor: float,
    num_images: int,
    tau: float = 10.0,
) -> Tensor:
    """
    Return L_main or L_vlr of one level.

    Args:
        student, teacher: bin logits, (N, R, 4, n + 1).
        weight: (N, R): w_r (`scores.confidence`) on Main, or v_r on the VLR; 0 elsewhere and on
            padding.
        factor: MAIN_FACTOR or VLR_FACTOR.
        num_images: N of the batch.
        tau: temperature, above 0.

    Returns:
        Scalar >= 0, float32 at least; 0 for equal logits.
    """
    divergence = softmax_divergence(student, teacher, tau=tau).sum(-1)
    scale = 2 / num_images * factor * tau**2 / student.shape[-1]
    return (weight.detach() * divergence).sum() * scale


def class_loss(student: Tensor, teacher: Tensor, main: Tensor, *, tau: float = 2.0) -> Tensor:
    """
    Return L_kd: the divergence of the classes, averaged over positives.

    Args:
        student, teacher: class logits, (N, R, K), of one level (paper) or of all.
        main: (N, R) in {0, 1}, the positives.
        tau: temperature, above 0.

    Returns:
        Scalar >= 0, float32 at least; 0, on the graph, without positives.
    """
    divergence = softmax_divergence(student, teacher, tau=tau)
    mean = (divergence * main).sum() / main.sum().clamp(min=1)
    return mean * (tau**2 / student.shape[-1])


class Regions(NamedTuple):
    """
    Where the R anchors of an image are distilled.

    Args:
        main: (R,) bool or in {0, 1}, the positives of ATSS.
        vlr: (R,), largest IoU with the boxes in whose ring an anchor lies, in [0, 1]; 0 outside.
    """

    main: Tensor
    vlr: Tensor


@torch.no_grad()
def find_regions(
    anchors: Sequence[Tensor], gt_boxes: Tensor, *, topk: int = 9, gamma: float = 0.25
) -> Regions:
    """
    Find the two regions of one image, as dense maps that no device has to wait for.

    Args:
        anchors: per level, the student's square anchors, (R_l, 4) corners in pixels.
        gt_boxes: (M, 4) corners in the same pixels; M may be 0.
        topk: candidates per box and level, as of the student's own assignment.
        gamma: the VLR begins at gamma times the threshold, in [0, 1]; 1 makes it empty.

    Returns:
        The regions, which may overlap.
    """
    every = torch.cat(list(anchors))
    if len(gt_boxes) == 0:
        return Regions(
            torch.zeros_like(every[:, 0], dtype=torch.bool), torch.zeros_like(every[:, 0])
        )
    candidates = find_candidates(anchors, gt_boxes, topk)
    main = match_candidates(every, gt_boxes, candidates) >= 0
    iou = aligned_iou(every[:, None], gt_boxes)  # (R, M)
    diou = iou - _center_penalty(every[:, None], gt_boxes)
    ring = (diou >= gamma * candidates.threshold) & (diou < candidates.threshold)
    return Regions(main, iou.where(ring, 0).amax(1))


def _center_penalty(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the squared distance of centres over the squared diagonal of the hull (DIoU)."""
    distance = (box_centers(boxes) - box_centers(others)).square().sum(-1)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    return distance / (high - low).square().sum(-1).clamp(min=eps)
