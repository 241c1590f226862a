"""
Losses of Generalized Focal Loss (Li et al., NeurIPS 2020), and the integral that reads its boxes.

    QFL(s) = -|y - s|^beta ((1 - y) log(1 - s) + y log s),  s = sigmoid(logit), y in [0, 1]  (eq. 2)
    y_hat  = sum_i P(i) i,  P = softmax over the bins i = 0 .. n                             (eq. 5)
    DFL(P) = -((i + 1 - y) log P(i) + (y - i) log P(i + 1)),  i <= y <= i + 1                (eq. 6)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """
    Focal loss whose targets are qualities, not only 0 and 1 (eq. 2).

    Args:
        logits: any shape, before the sigmoid.
        targets: same shape, in [0, 1]: the IoU at a positive's own class, 0 elsewhere.
        beta: exponent that turns down what is already well estimated.

    Returns:
        The loss of each element, same shape, float32 or float64; 0 where the sigmoid equals the
        target.
    """
    logits, targets = at_least_float32(logits), at_least_float32(targets)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (targets - logits.sigmoid()).abs().pow(beta) * cross_entropy


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Cross-entropy against the two bins around each target (eq. 6).

    Args:
        logits: (..., n + 1) scores of the bins 0 .. n, before the softmax; n >= 1.
        targets: (...) in [0, n], in bins.

    Returns:
        The loss of each distribution, (...), float32 or float64. Smallest when the distribution has
        all its mass on the two bins around the target and the target as its mean.
    """
    log_p = at_least_float32(logits).log_softmax(dim=-1)
    targets = targets.to(log_p.dtype)
    left = targets.floor().clamp(min=0, max=logits.shape[-1] - 2)
    right_share = targets - left
    index = left.long()[..., None]
    log_left = log_p.gather(-1, index)[..., 0]
    log_right = log_p.gather(-1, index + 1)[..., 0]
    return -((1 - right_share) * log_left + right_share * log_right)


def distribution_mean(logits: Tensor) -> Tensor:
    """
    Mean of each discrete distribution over the bins 0 .. n (eq. 5).

    Args:
        logits: (..., n + 1), before the softmax.

    Returns:
        (...) values in [0, n], in bins, float32 or float64.
    """
    p = at_least_float32(logits).softmax(dim=-1)
    bins = torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)
    # Not a matrix product: autocast would run that in half precision.
    return (p * bins).sum(dim=-1)
