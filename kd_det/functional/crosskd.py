"""
The maths of CrossKD on one pyramid level: the student's features in the teacher's head.

Paper: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.
The student's features f^S at some place of the head take the statistics of the teacher's there,

    a = (f^S - mean^S) / sqrt(var^S + eps) * sqrt(var^T + eps) + mean^T       per channel,

and the frozen rest of the teacher's head makes a cross-head prediction z^ of them, which imitates
the teacher's own z^T. With w_r = max_k sigmoid(z^T_rk):

    L_cls = 1/N+ sum |sigmoid(z^) - sigmoid(z^T)|^beta CE(z^, sigmoid(z^T))
    L_reg = 1/N+ sum w_r (1 - GIoU(b^_r, b^T_r))     or -log IoU (the release's FCOS)     boxes
    L_reg = 1/4 sum w_r sum_{4 sides} KL(softmax z^T || softmax z^) / max(sum w_r, 1)     bins
    L_quality = 1/N+ sum_{positives} CE(q^, sigmoid(q^T))                                 ATSS

L_cls is `bckd.classification_loss`. The release has the unbiased deviation and adds eps to the
student's alone, so that equal features give slightly unequal predictions and a single cell NaN; it
divides the bins by a sum that may be 0, and FCOS's terms by the batch's centerness.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from kd_det.functional.boxes import aligned_giou, aligned_iou
from kd_det.functional.divergence import softmax_divergence
from kd_det.functional.moments import Scope, channel_moments, inverse_deviation
from kd_det.functional.precision import at_least_float32

BoxDistance = Literal["giou", "log_iou"]


def align_statistics(
    student: Tensor,
    teacher: Tensor,
    *,
    scope: Scope = "batch",
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """
    Give each channel of the student's features the teacher's mean and deviation.

    Args:
        student, teacher: (N, C, H, W), any floating dtype.
        scope: whether a channel's statistics are those of the batch (release) or of each image.
        mask: (N, 1, H, W) in {0, 1}, cells that statistics are taken over; None for all.
        eps: added to each variance; a student's channel of no larger variance becomes the
            teacher's mean, without gradient.

    Returns:
        (N, C, H, W), float32 at least; the teacher's features for a student that equals it or a
        positive affine copy, up to eps. Gradient reaches the student, its mean and its deviation.
    """
    own = channel_moments(student, mask=mask, scope=scope)
    other = channel_moments(teacher.detach(), mask=mask, scope=scope)
    with torch.autocast(student.device.type, enabled=False):
        gain = inverse_deviation(own.variance, eps) * torch.sqrt(other.variance + eps)
        return own.centred * gain + other.mean


def box_loss(
    predicted: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    normalizer: float | Tensor,
    distance: BoxDistance = "giou",
    eps: float = 1e-6,
) -> Tensor:
    """
    Return L_reg for decoded boxes.

    Args:
        predicted: cross-head boxes, (N, R, 4) corners in the same pixels as the next.
        teacher: its own boxes, (N, R, 4).
        weight: w times V, (N, R), see `scores.confidence`.
        normalizer: N+, at least 1.
        distance: "giou" for 1 - GIoU, or "log_iou" for -log(IoU) (FCOS).
        eps: smallest IoU that a logarithm is taken of; below it there is no gradient.

    Returns:
        Scalar >= 0, float32 at least.

    Raises:
        ValueError: an unknown distance.
    """
    if distance not in get_args(BoxDistance):
        raise ValueError(f"distance is {distance!r}, expected 'giou' or 'log_iou'.")
    with torch.autocast(predicted.device.type, enabled=False):
        own, other = at_least_float32(predicted), at_least_float32(teacher.detach())
        if distance == "giou":
            loss = 1 - aligned_giou(own, other)
        else:
            loss = -aligned_iou(own, other).clamp(min=eps).log()
        return (weight * loss).sum() / normalizer


def bin_loss(
    predicted: Tensor, teacher: Tensor, weight: Tensor, *, total_weight: float | Tensor
) -> Tensor:
    """
    Return L_reg for distributions over bins (GFL).

    Args:
        predicted: cross-head logits, (N, R, 4, n + 1).
        teacher: its own logits, (N, R, 4, n + 1).
        weight: w times V, (N, R), see `scores.confidence`.
        total_weight: the sum of the weights over all levels, averaged over processes; the caller
            keeps it at 1 or more.

    Returns:
        Scalar >= 0, float32 at least; 0 for equal logits.
    """
    divergence = softmax_divergence(predicted, teacher).sum(-1)
    with torch.autocast(predicted.device.type, enabled=False):
        return (weight * divergence).sum() / 4 / total_weight


def quality_loss(
    predicted: Tensor, teacher: Tensor, weight: Tensor, *, normalizer: float | Tensor
) -> Tensor:
    """
    Return L_quality of one level.

    Args:
        predicted: cross-head logits of the boxes' quality, (N, R).
        teacher: its own logits, (N, R).
        weight: (N, R): 1 at the positives of ATSS, 0 elsewhere and on padding.
        normalizer: N+, at least 1.

    Returns:
        Scalar >= 0, float32 at least; least, but not 0, for equal logits; 0, on the graph, without
        positives.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        target = at_least_float32(teacher.detach()).sigmoid()
        own = at_least_float32(predicted)
        loss = functional.binary_cross_entropy_with_logits(own, target, reduction="none")
        return (weight * loss).sum() / normalizer
