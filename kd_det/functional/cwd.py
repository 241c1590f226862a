"""
The loss of CWD on one map: where in the image each channel looks.

Paper: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. Each
channel's cells are a distribution, q = softmax_cells(T / tau) and p = softmax_cells(S / tau):

    L = tau^2 / (N C) * sum_{n, c} sum_cells q (log q - log p)

The release lets the padding of a batch take part in both softmaxes; with a mask it does not here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32


def channel_divergence(
    student: Tensor, teacher: Tensor, *, tau: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """
    Return the Kullback-Leibler divergence of the channels' distributions over cells.

    Args:
        student, teacher: (N, C, H, W), any floating dtype: feature maps, or class logits.
        tau: temperature, above 0; larger values look at more cells.
        mask: (N, 1, H, W) in {0, 1}, cells that take part; None for all.

    Returns:
        Scalar >= 0, the mean over images and channels times tau^2, float32 at least; 0 for maps
        that differ by a number per channel and image. An image without any cell gives 0. The
        gradient is the student's and sums to zero over each channel of each image.
    """
    with torch.autocast(student.device.type, enabled=False):
        own = _log_softmax_of_cells(student, tau, mask)
        other = _log_softmax_of_cells(teacher.detach(), tau, mask)
        divergence = F.kl_div(own, other, reduction="sum", log_target=True)
        return divergence * (tau**2 / (student.shape[0] * student.shape[1]))


def _log_softmax_of_cells(x: Tensor, tau: float, mask: Tensor | None) -> Tensor:
    """Return (N, C, H * W); masked cells have probability 0."""
    logits = (at_least_float32(x) / tau).flatten(2)
    if mask is not None:
        # The smallest number instead of -inf: an image without any cell becomes uniform on both
        # sides, which is a divergence of 0, and not NaN.
        logits = logits.masked_fill(mask.flatten(2) == 0, torch.finfo(logits.dtype).min)
    return logits.log_softmax(2)
