"""What a dense detector's class logits say about its positions."""

import torch
from torch import Tensor

from kd_det.functional.precision import at_least_float32


@torch.no_grad()
def confidence(logits: Tensor) -> Tensor:
    """
    Return the highest class probability of each position.

    Args:
        logits: (N, R, K), any floating dtype.

    Returns:
        max_k sigmoid(logits), (N, R) in [0, 1], float32 at least, without gradient.
    """
    return at_least_float32(logits.amax(-1)).sigmoid()


@torch.no_grad()
def score_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """
    Return the largest difference of a position's class probabilities.

    Args:
        student, teacher: class logits, (N, R, K), any floating dtype.

    Returns:
        max_k |sigmoid(teacher) - sigmoid(student)|, (N, R) in [0, 1], float32 at least, without
        gradient.
    """
    gap = at_least_float32(teacher).sigmoid() - at_least_float32(student).sigmoid()
    return gap.abs().amax(-1)
