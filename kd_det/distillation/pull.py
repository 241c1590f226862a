"""
How much a distiller pulls on the student's captured features F, beside the detection losses.

    r   = |dL_k / dF| / |dL_det / dF|       L_k the distiller's loss at unit weight
    m_t = mean of log r at step t           over the processes where it is finite
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.distance import at_least_float32

# Keeps float16 gradients of small losses above the smallest number; it cancels in the ratio.
_SCALE = 1024.0


class Pull(NamedTuple):
    """Norms of the gradients of a distiller's and of the detection losses at F, scalars."""

    distilled: Tensor
    detection: Tensor


class Reading(NamedTuple):
    """
    One step's measurement of one distiller.

    Args:
        log_ratio: m_t; None if no process has a finite one.
        distilled, detection: this process's norms.
    """

    log_ratio: float | None
    distilled: float
    detection: float


def measure_pull(
    name: str, distilled: Tensor, detection: Tensor, features: Sequence[Tensor]
) -> Pull:
    """
    Measure how two losses pull on captured features; both graphs are kept.

    Args:
        name: the distiller's key, for the message.
        distilled: its losses at unit weight, summed.
        detection: the student's own losses, summed.
        features: the captured student tensors, before adapters; those that the first loss reaches
            count, for both norms.

    Returns:
        Both norms over all these tensors together, float32 at least, on their device.

    Raises:
        ValueError: none of the features is in the graph.
    """
    inputs = [x for x in features if x.requires_grad]
    if not inputs:
        raise ValueError(
            f"KD.{name}.SHARE: what this distiller captures of the student has no gradient (a "
            f"frozen part, or none of its {len(features)} maps is trained), so that its pull "
            "cannot be measured. Capture a trained part, or set WEIGHT."
        )
    gradients = _gradients(distilled, inputs)
    reached = [x for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    return Pull(_norm(gradients, distilled), _norm(_gradients(detection, reached), detection))


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not inputs or not loss.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(loss * _SCALE, inputs, retain_graph=True, allow_unused=True)


def _norm(gradients: Sequence[Tensor | None], loss: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(at_least_float32(g)) for g in gradients if g is not None]
    if not norms:
        return at_least_float32(loss.detach()).new_zeros(())
    return torch.linalg.vector_norm(torch.stack(norms)) / _SCALE


def combine(
    pulls: Sequence[Pull], all_reduce: Callable[[Tensor], Tensor] | None = None
) -> list[Reading]:
    """
    Average the log ratios of D distillers over processes; one wait for the device.

    Args:
        pulls: of each distiller on this process.
        all_reduce: from a (2, D) float64 tensor to its sum over processes; every process calls it,
            also where none of its ratios is finite. None for a single process.

    Returns:
        One reading per distiller; m_t is the same, bit for bit, on all processes.
    """
    norms = torch.stack([torch.stack(pull) for pull in pulls]).double()  # (D, 2)
    log_ratio = norms[:, 0].log() - norms[:, 1].log()
    finite = log_ratio.isfinite()
    totals = torch.stack([log_ratio.where(finite, 0), finite.double()])
    if all_reduce is not None:
        totals = all_reduce(totals)
    rows = torch.cat([totals, norms.T]).T.tolist()
    return [
        Reading(total / count if count else None, distilled, detection)
        for total, count, distilled, detection in rows
    ]
