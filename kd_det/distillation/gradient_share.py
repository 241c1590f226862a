"""
How much a distiller pulls on the student, beside its detection losses.

    kd/<distiller>/grad_share = |d loss_kd / d F| / |d loss_det / d F|

F are the student's captured features of that distiller; norms are over all of them. Weights of
published methods span four orders of magnitude; the share says whether one is asleep or in command.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

_logger = logging.getLogger(__name__)

LOW, HIGH = 0.01, 10.0
# A share counts as staying low or high after this many measurements in a row.
_PATIENCE = 3
# Keeps float16 gradients of small losses above the smallest number; it cancels in the ratio.
_SCALE = 1024.0


class GradientShare:
    """
    Measures the shares every `period` iterations, and warns once where one stays extreme.

    Args:
        period: iterations between measurements; 0 for never.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self._streak: dict[str, int] = {}
        self._warned: set[str] = set()

    def is_due(self, iteration: int) -> bool:
        """Return whether this iteration is measured."""
        return self.period > 0 and iteration % self.period == 0

    def measure(
        self,
        detection: Mapping[str, Tensor],
        distilled: Mapping[str, Tensor],
        features: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, float]:
        """
        Measure and log each distiller's share.

        Args:
            detection: the student's losses.
            distilled: per distiller, its weighted loss.
            features: per distiller, the captured student features.

        Returns:
            Share per distiller; only those that have features in the graph.
        """
        total = torch.stack([value.float() for value in detection.values()]).sum()
        shares = {}
        for key, loss in distilled.items():
            inputs = [x for x in features[key] if x.requires_grad]
            if not inputs or not loss.requires_grad:
                continue
            share = (_norm(loss, inputs) / _norm(total, inputs).clamp(min=1e-30)).item()
            shares[key] = share
            get_event_storage().put_scalar(f"kd/{key}/grad_share", share)
            self._warn(key, share)
        return shares

    def _warn(self, key: str, share: float) -> None:
        extreme = not LOW <= share <= HIGH
        self._streak[key] = self._streak.get(key, 0) + 1 if extreme else 0
        if self._streak[key] == _PATIENCE and key not in self._warned:
            self._warned.add(key)
            advice = "raise" if share < LOW else "lower"
            _logger.warning(
                "%s: the gradient of its loss at the paired features has been %.2g times that of "
                "the detection losses for %d measurements; %s its WEIGHT.",
                key,
                share,
                _PATIENCE,
                advice,
            )


def _norm(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss * _SCALE, inputs, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())
