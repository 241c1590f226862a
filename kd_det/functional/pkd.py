"""
The loss of PKD on one pyramid level: Pearson correlation of student and teacher, per channel.

Paper: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022. With z = (x - mean) / sqrt(variance + eps) of each channel over the m
cells of the batch:

    L = 1 / (2 C m) * sum (z^S - z^T)^2     = mean over channels of 1 - r, up to eps

The release divides by the unbiased deviation plus eps, which gives (m - 1) / m of this value and
NaN for a single cell, and gives a constant channel a huge gradient. Here the variance is the
population's, and a channel of variance at most eps becomes z = 0 without gradient.
"""

import torch
from torch import Tensor

from kd_det.functional.distance import masked_mean
from kd_det.functional.moments import Scope, standardize_channels


def pearson_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    scope: Scope = "batch",
    eps: float = 1e-6,
) -> Tensor:
    """
    Return 1 minus the correlation of student and teacher, averaged over channels.

    Args:
        student, teacher: (N, C, H, W), any floating dtype.
        mask: (N, 1, H, W) in {0, 1}, cells that count; None for all.
        scope: "batch" correlates over all images at once (paper), "image" over each; the cells of
            all images then count equally in the mean.
        eps: added to each variance, and the largest variance of a dead channel.

    Returns:
        Scalar in [0, 2], float32 at least: 0 for every positive affine copy of the teacher, 1/2 for
        a dead channel of the student alone. The gradient is the student's and sums to zero over
        each channel.
    """
    own = standardize_channels(student, mask=mask, scope=scope, eps=eps)
    other = standardize_channels(teacher.detach(), mask=mask, scope=scope, eps=eps)
    with torch.autocast(student.device.type, enabled=False):
        return masked_mean((own - other).square(), mask) / 2
