"""
How hard, and which way, a distiller pulls on the student, beside its detection losses.

    share  = |d loss_kd / d F| / |d loss_det / d F|
    cosine = <d loss_kd / d F, d loss_det / d F> / their norms

F are the student's captured tensors of that distiller on which its loss depends; norms are over all
of them. A share says whether a distiller is asleep or in command, a negative cosine that the two
want opposite things.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

LOW, HIGH = 0.01, 3.0
# Steps at the start of a run that are all measured and warned about at once.
FIRST = 20
# A short run is measured this many times after them, if its steps suffice.
_TIMES = 50
# Seldom enough for a measurement's two passes through the head to cost next to nothing.
_SELDOM = 20
# Later, a share counts as staying low or high after this many measurements in a row.
_PATIENCE = 3
# Keeps float16 gradients of small losses above the smallest number.
_SCALE = 1024.0


@dataclass(frozen=True)
class Pull:
    """
    Gradients of a distiller and of the detection losses at the same tensors.

    Attributes:
        distiller, detection: their norms, scalars; NaN or infinite where they overflowed.
        dot: their inner product.
    """

    distiller: Tensor
    detection: Tensor
    dot: Tensor

    @property
    def ratio(self) -> Tensor:
        """The distiller's norm over that of the detection losses; NaN where the latter is zero."""
        return torch.where(self.detection > 0, self.distiller / self.detection, float("nan"))

    @property
    def cosine(self) -> Tensor:
        """The cosine of the angle between both, in [-1, 1]; NaN where one is zero."""
        return self.dot / (self.distiller * self.detection)


def measuring_period(wanted: int, max_iter: int) -> int:
    """
    Return the iterations between measurements: `wanted`, and fewer in runs that are short.

    Args:
        wanted: KD.GRAD_SHARE_PERIOD; 0 for never.
        max_iter: of the run.
    """
    return min(wanted, max(_SELDOM, max_iter // _TIMES))


def pull(distilled: Tensor, detection: Tensor, features: Sequence[Tensor]) -> Pull:
    """
    Measure both gradients at the captured tensors; the graph stays for the backward pass.

    No hook of a parameter fires, so DDP does not notice.

    Args:
        distilled: a distiller's loss.
        detection: the sum of the student's own losses.
        features: the student's captured tensors.

    Raises:
        ValueError: none of them is part of the graph.
    """
    inputs = [x for x in features if x.requires_grad]
    if not inputs or not distilled.requires_grad:
        raise ValueError(
            "what is captured of the student carries no gradient, so the distiller cannot move it; "
            "capture something that trains."
        )
    own = _gradients(distilled, inputs)
    # Only what the loss depends on: a level that it leaves out must not count as detection's.
    used = [(x, g) for x, g in zip(inputs, own, strict=True) if g is not None]
    if not used:
        zero = distilled.detach().float() * 0
        return Pull(zero, zero, zero)
    other = _gradients(detection, [x for x, _ in used])
    pairs = [
        (g.float(), torch.zeros_like(x, dtype=torch.float32) if d is None else d.float())
        for (x, g), d in zip(used, other, strict=True)
    ]
    return Pull(
        distiller=torch.stack([g.square().sum() for g, _ in pairs]).sum().sqrt() / _SCALE,
        detection=torch.stack([d.square().sum() for _, d in pairs]).sum().sqrt() / _SCALE,
        dot=torch.stack([(g * d).sum() for g, d in pairs]).sum() / _SCALE**2,
    )


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    out: Sequence[Tensor | None] = torch.autograd.grad(
        loss * _SCALE, inputs, retain_graph=True, allow_unused=True
    )
    return out


class ShareWatch:
    """
    Says when shares are measured, and warns once per distiller where one is extreme.

    Args:
        period: iterations between measurements; 0 for never.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self._steps: dict[str, int] = {}
        self._streak: dict[str, int] = {}
        self._warned: set[str] = set()

    def is_due(self, iteration: int) -> bool:
        """Return whether this iteration is measured."""
        return self.period > 0 and iteration % self.period == 0

    def is_new(self, name: str) -> bool:
        """Return whether a distiller has been measured fewer than `FIRST` times."""
        return self.period > 0 and self._steps.get(name, 0) < FIRST

    def hear(self, name: str, share: float, *, wanted: float | None = None) -> None:
        """
        Take note of a weighted share, and warn where it is extreme: at once in the first steps,
        after several measurements in a row later.

        Args:
            name: of the distiller.
            share: as measured; what could not be measured, infinite or NaN, is left out. Zero,
                of a batch without objects for one, is extreme only if it stays.
            wanted: the SHARE of a weight that sets itself. Its pull begins there and fades, so that
                only one far above what was wanted is extreme.
        """
        at_once = self.is_new(name) and share > 0
        # Counted in any case: processes must agree on which steps are measured.
        self._steps[name] = self._steps.get(name, 0) + 1
        if not math.isfinite(share):
            return
        low, high = (LOW, HIGH) if wanted is None else (0.0, HIGH * max(1.0, wanted))
        extreme = not low <= share <= high
        self._streak[name] = self._streak.get(name, 0) + 1 if extreme else 0
        if not extreme or name in self._warned or (self._streak[name] < _PATIENCE and not at_once):
            return
        self._warned.add(name)
        remedy = "raise" if share < low else "lower"
        if wanted is None:
            remedy += " its WEIGHT, or remove it and let KD's SHARE set it"
        else:
            remedy += f" its SHARE, {wanted:g}"
        _logger.warning(
            "%s: the gradient of its loss at the captured features is %.2g times that of the "
            "detection losses%s; %s (docs/troubleshooting.md).",
            name,
            share,
            "" if at_once else f", for {_PATIENCE} measurements",
            remedy,
        )
