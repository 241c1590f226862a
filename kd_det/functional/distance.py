"""Point-wise distances between feature maps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32


def mean_distance(
    student: Tensor, teacher: Tensor, *, p: int = 2, mask: Tensor | None = None
) -> Tensor:
    """
    Mean of |student - teacher|^p, in float32 whatever autocast says; its gradient is the student's.

    Args:
        student, teacher: (N, C, H, W).
        p: 1 or 2.
        mask: (N, 1, H, W) in {0, 1}; the mean is over the cells where it is 1, of the whole batch.

    Returns:
        Scalar >= 0; 0 (attached to the graph) where the mask is empty.
    """
    with torch.autocast(student.device.type, enabled=False):
        difference = at_least_float32(student) - at_least_float32(teacher.detach())
        return masked_mean(difference.abs() if p == 1 else difference.square(), mask)


def smooth_l1_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of Huber's loss with its bend at 1; arguments and precision as in `mean_distance`."""
    with torch.autocast(student.device.type, enabled=False):
        maps = at_least_float32(student), at_least_float32(teacher.detach())
        return masked_mean(F.smooth_l1_loss(*maps, reduction="none"), mask)


def cosine_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """
    Mean over cells of one minus the cosine between both maps' channels, in [0, 2].

    Lengths do not matter, so maps of other kinds of models, a ViT's for one, can be compared.
    Arguments and precision as in `mean_distance`.
    """
    with torch.autocast(student.device.type, enabled=False):
        maps = at_least_float32(student), at_least_float32(teacher.detach())
        return masked_mean(1 - F.cosine_similarity(*maps, dim=1)[:, None], mask)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """
    Mean over the cells that count.

    Args:
        values: (N, C, H, W).
        mask: (N, 1, H, W) in {0, 1}; None counts all cells.

    Returns:
        Scalar; 0 (attached to the graph) where the mask is empty.
    """
    if mask is None:
        return values.mean()
    return (values * mask).sum() / (mask.sum().clamp(min=1) * values.shape[1])


def masked_standardize(x: Tensor, *, mask: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """
    Standardise each channel of each image to mean 0 and variance 1 over its cells.

    Args:
        x: (N, C, H, W).
        mask: (N, 1, H, W) in {0, 1}: cells that count for mean and variance.
        eps: added to the variance; a constant channel becomes 0.

    Returns:
        (N, C, H, W), float32 at least.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        weight = torch.ones_like(x[:, :1]) if mask is None else mask.to(x.dtype)
        count = weight.sum((2, 3), keepdim=True).clamp(min=1)
        centred = x - (x * weight).sum((2, 3), keepdim=True) / count
        variance = (centred.square() * weight).sum((2, 3), keepdim=True) / count
        return centred * torch.rsqrt(variance + eps)
