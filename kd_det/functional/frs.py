"""
The losses of FRS on one pyramid level: imitate where the teacher sees something.

Paper: Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021. The richness W
of a cell is the teacher's highest class probability there; z are class logits, sigma the sigmoid:

    D      = sum W
    L_feat = sum W sum_c (T_c - S_c)^2 / max(D, eps)
    L_head = sum W sum_d b(z^S_d, sigma(z^T_d)) / max(D, eps)
    b(x, q) = -q log sigma(x) - (1 - q) log(1 - sigma(x)) - H(q)

The paper's b is the cross-entropy alone; minus the teacher's entropy H(q) it has the same gradient
and is 0 for equal scores. The release takes one ratio over the batch (scope "batch"); the paper's
formula is per image. Its cross-entropy of probabilities meets log(0), and D may be 0; here b is
computed from logits and D is clamped.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.moments import Scope
from kd_det.functional.precision import at_least_float32


@torch.no_grad()
def richness(logits: Tensor) -> Tensor:
    """
    Return the highest class probability of each cell.

    Args:
        logits: the teacher's class logits, all anchors and classes of a cell as channels,
            (N, A * K, H, W); of an R-CNN, its proposals' objectness (N, A, H, W).

    Returns:
        W in [0, 1], (N, 1, H, W), float32 at least, without gradient.
    """
    return at_least_float32(logits.amax(1, keepdim=True)).sigmoid()


def feature_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    scope: Scope = "image",
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """
    Return L_feat, the squared error of the features where the teacher's scores are high.

    Args:
        student, teacher: (N, C, H, W), any floating dtype.
        weight: W, (N, 1, H, W), see `richness`.
        scope: "image" averages the images' ratios (paper), "batch" is one ratio (release).
        mask: (N, 1, H, W) in {0, 1}, cells that count; None for all.
        eps: smallest D that is divided by.

    Returns:
        Scalar >= 0, summed over channels, float32 at least.
    """
    with torch.autocast(student.device.type, enabled=False):
        error = (at_least_float32(student) - at_least_float32(teacher.detach())).square()
        return _weighted_mean(error, weight, scope, mask, eps)


def head_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    scope: Scope = "image",
    mask: Tensor | None = None,
    eps: float = 1e-6,
    subtract_entropy: bool = True,
) -> Tensor:
    """
    Return L_head, the binary cross-entropy of the class scores where the teacher's are high.

    Args:
        student, teacher: class logits, (N, D, H, W) with D = A * K.
        weight, scope, mask, eps: as of `feature_loss`.
        subtract_entropy: whether the teacher's entropy goes off, which makes equal scores 0; False
            gives the paper's value.

    Returns:
        Scalar, summed over the D channels, float32 at least; >= 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = at_least_float32(teacher.detach())
        probability = target.sigmoid()
        error = _cross_entropy(at_least_float32(student), probability)
        if subtract_entropy:
            error = error - _cross_entropy(target, probability)
        return _weighted_mean(error, weight, scope, mask, eps)


def _cross_entropy(logits: Tensor, probability: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, probability, reduction="none")


def _weighted_mean(
    error: Tensor, weight: Tensor, scope: Scope, mask: Tensor | None, eps: float
) -> Tensor:
    """Weigh the cells of (N, C, H, W), summed over channels; the mean over images for "image"."""
    if scope not in ("batch", "image"):
        raise ValueError(f"scope is {scope!r}, expected 'batch' or 'image'.")
    weight = weight.to(error.dtype)
    if mask is not None:
        weight = weight * mask
    dims = (1, 2, 3) if scope == "image" else (0, 1, 2, 3)
    return ((error * weight).sum(dims) / weight.sum(dims).clamp(min=eps)).mean()
