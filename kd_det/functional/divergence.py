"""Divergence of two softmax distributions over the last dimension, softened by a temperature."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32


def softmax_divergence(student: Tensor, teacher: Tensor, *, tau: float = 1.0) -> Tensor:
    """
    Return sum q (log q - log p) with q = softmax(teacher / tau) and p = softmax(student / tau).

    Args:
        student, teacher: logits (..., n), any floating dtype.
        tau: temperature, above 0; larger values flatten both.

    Returns:
        (...), >= 0 up to rounding, float32 at least, without a factor of tau; 0 for logits that
        differ by a number. The gradient is the student's.
    """
    with torch.autocast(student.device.type, enabled=False):
        own = (at_least_float32(student) / tau).log_softmax(-1)
        other = (at_least_float32(teacher.detach()) / tau).log_softmax(-1)
        return F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
