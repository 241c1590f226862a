"""
A weight that sets itself: at first the distiller pulls on the student as hard as SHARE says.

    r   = |d L_kd / d F| / |d L_det / d F|     F: the student's captured tensors, L_kd at weight 1
    m_t = mean over processes of log r         of calibration step t
    w   = SHARE / exp(median_t m_t)            frozen after STEPS steps

Published weights span 2e-5 to 10 and belong to one framework's losses and sizes; this ratio does
not. It is measured at the start only: a weight that kept following it would grow without end as the
student comes close to its teacher, would undo the schedule, and would follow no loss's gradient.
"""

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillation.gradient_share import HIGH, LOW
from kd_det.distillation.schedule import Schedule
from kd_det.distillers import Distiller, node_name
from kd_det.distillers.shares import share_of
from kd_det.functional.reduce import sum_over_processes

_logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-9, 1e6
# Ratios of one calibration further apart than this factor make their median doubtful.
_SPREAD = 100.0

# Active iterations without distillation at the start of a long run.
_START = 500

# A sum over processes of a small tensor.
Reduce = Callable[[Tensor], Tensor]


def auto_weights(
    cfg: CfgNode, distillers: Mapping[str, Distiller], *, trained: bool, kin: bool
) -> dict[str, "AutoWeight"]:
    """
    Return the weights that set themselves: those of distillers without a WEIGHT.

    Args:
        cfg: the full config.
        distillers: by entry of KD.DISTILLERS.
        trained: whether the student starts from trained weights.
        kin: whether its teacher has its net below the pyramid.

    Raises:
        ValueError: a distiller has a WEIGHT and a SHARE of its own, of which only one can hold; or
            its schedule ends before its weight could be measured.
    """
    out = {}
    for name, distiller in distillers.items():
        node = cfg.KD[node_name(name)]
        if node.WEIGHT is None:
            paths = ", ".join(sorted({s.student for s in distiller.captures() if s.student}))
            start = min(_START, cfg.SOLVER.MAX_ITER // 100)
            share = share_of(distiller, node, trained=trained, kin=kin)
            _logger.info("%s: its weight sets itself, by a SHARE of %g.", name, share)
            if not LOW <= share <= HIGH:
                _logger.warning(
                    "%s: a SHARE of %g lets it %s; %g to %g is usual. Leave it out for the "
                    "method's own (docs/troubleshooting.md).",
                    name,
                    share,
                    "sleep" if share < LOW else "command its student",
                    LOW,
                    HIGH,
                )
            _expect_active(name, node, cfg.SOLVER.MAX_ITER, start)
            out[name] = AutoWeight(name, share, captured=paths, start=start)
        elif node.SHARE is not None:
            key = f"KD.{node_name(name)}"
            raise ValueError(
                f"{key}.WEIGHT is {node.WEIGHT} and {key}.SHARE {node.SHARE}: a given weight "
                "leaves no share to be reached. Give one of them."
            )
        else:
            _logger.info("%s: weight %g, as given.", name, node.WEIGHT)
    return out


def _expect_active(name: str, node: CfgNode, max_iter: int, start: int) -> None:
    """Raise ValueError where a schedule leaves a weight that sets itself nothing to measure."""
    schedule = Schedule.from_config(node, max_iter)
    active = (iteration for iteration in range(max_iter) if schedule(iteration) > 0)
    if next(itertools.islice(active, start, None), None) is None:
        key = f"KD.{node_name(name)}.SCHEDULE"
        raise ValueError(
            f"{name}: its weight is measured after {start} active iterations, and {key} "
            f"(STOP_AT {node.SCHEDULE.STOP_AT}, STEPS {list(node.SCHEDULE.STEPS)}, FACTORS "
            f"{list(node.SCHEDULE.FACTORS)}) has no more of them in {max_iter} iterations. "
            "Let it be active longer, or set its WEIGHT."
        )


class AutoWeight:
    """
    The weight of one distiller, measured over the first steps at which it is active.

    Args:
        name: for messages: the entry of KD.DISTILLERS.
        captured: for messages: where the gradients are compared.
        share: wanted ratio of the gradients, > 0.
        start: active iterations before the first measurement, in which the distiller rests.
        steps: valid measurements after which the weight is frozen.
        reduce: how processes add up.

    Raises:
        ValueError: a share that is not positive and finite.
    """

    def __init__(
        self,
        name: str,
        share: float,
        *,
        captured: str = "what it captures",
        start: int = 0,
        steps: int = 50,
        reduce: Reduce = sum_over_processes,
    ) -> None:
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"{name}: SHARE must be finite and > 0, found {share}.")
        self.name, self.share, self.start, self.steps = name, share, start, steps
        self.captured = captured
        self._reduce = reduce
        self._seen = 0
        self._rested = 0
        self._logs: list[float] = []
        self._frozen: float | None = None
        self._norms: Mapping[str, Tensor] = {}
        self._warned: set[str] = set()

    @property
    def calibrating(self) -> bool:
        """Whether the next active step is to be measured."""
        return self._frozen is None

    def rests(self) -> bool:
        """Count an active iteration; return whether the distiller still rests in it."""
        # Once measured it goes on, though a run that was made longer meanwhile would rest longer.
        if self._rested >= self.start or self._logs or self._frozen is not None:
            return False
        self._rested += 1
        return True

    def measure(self, ratio: Tensor, norms: Mapping[str, Tensor] | None = None) -> None:
        """
        Take one step's ratio into account. Every process calls it in every calibration step.

        Args:
            ratio: this process's |d L_kd / d F| / |d L_det / d F|, scalar; zero, infinite or NaN
                where it could not be measured.
            norms: for messages: whose gradients they are, and scalars.

        Raises:
            ValueError: ten times as many steps as needed gave no single ratio.
        """
        self._seen += 1
        self._norms = norms or {}
        log = ratio.detach().double().log()
        counts = log.isfinite().double()
        both = torch.stack([torch.nan_to_num(log, nan=0.0, posinf=0.0, neginf=0.0), counts])
        total, count = self._reduce(both).tolist()
        if count:
            self._logs.append(total / count)
        elif self._seen >= 10 * self.steps and not self._logs:
            raise ValueError(
                f"{self.name}: its loss has had no gradient at {self.captured} in {self._seen} "
                "steps, so no weight could be measured. Capture something the loss depends on, or "
                "set its WEIGHT."
            )
        if len(self._logs) >= self.steps:
            self.freeze()

    def freeze(self) -> None:
        """End the calibration with what was measured so far; without any, leave a warning."""
        if self._frozen is not None:
            return
        if not self._logs:
            if "never active" not in self._warned:
                _logger.warning("%s was never active: its weight was not measured.", self.name)
                self._warned.add("never active")
            return
        self._frozen = statistics.median(self._logs)
        spread = max(self._logs) - min(self._logs)
        _logger.info(
            "%s: weight %.4g, set so that its gradient is %g times that of the detection losses "
            "(median ratio at weight 1 over %d steps: %.4g, largest over smallest: %.3g).",
            self.name,
            self.weight,
            self.share,
            len(self._logs),
            math.exp(self._frozen),
            math.exp(spread),
        )
        if spread > math.log(_SPREAD):
            _logger.warning(
                "%s: the ratios measured for its weight are up to %.3g times apart; look at its "
                "logged grad_share and set WEIGHT by hand if that is not near %g.",
                self.name,
                math.exp(spread),
                self.share,
            )

    @property
    def weight(self) -> float:
        """The weight by what was measured so far, 0 before the first measurement."""
        if self._frozen is None and not self._logs:
            return 0.0
        median = statistics.median(self._logs) if self._frozen is None else self._frozen
        wanted = self.share / math.exp(median)
        weight = min(max(wanted, LOWEST), HIGHEST)
        if weight != wanted and "clamped" not in self._warned:
            self._warned.add("clamped")
            _logger.warning(
                "%s: a share of %g would need the weight %.3g (ratio %.3g at weight 1%s); "
                "it stays at %.3g.",
                self.name,
                self.share,
                wanted,
                math.exp(median),
                "".join(
                    f", {whose} gradient {float(norm):.3g}" for whose, norm in self._norms.items()
                ),
                weight,
            )
        return weight

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured; not the weight, so that a changed SHARE rescales it exactly."""
        return {
            "logs": list(self._logs),
            "frozen": self._frozen,
            "seen": self._seen,
            "rested": self._rested,
            "share": self.share,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; another SHARE than then is logged."""
        self._logs, self._frozen = list(state["logs"]), state["frozen"]
        self._seen, self._rested = state["seen"], state["rested"]
        if state["share"] != self.share:
            _logger.info(
                "%s: SHARE was %g and is %g now; its weight changes by that factor.",
                self.name,
                state["share"],
                self.share,
            )
