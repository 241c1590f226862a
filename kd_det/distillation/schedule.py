"""
Course of a distiller's weight over the iterations: pure functions, so that resuming needs no state.

    weight(t) = WEIGHT * warm-up(t) * decay(t) * piecewise(t) * [t before the stop]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from kd_det.distillers import node_name


def linear_warmup(iteration: int, length: int) -> float:
    """Return min(1, iteration / length): 0 at iteration 0, 1 from `length` on; 1 if length is 0."""
    return 1.0 if length <= 0 else min(1.0, iteration / length)


def cosine_decay(iteration: int, total: int, final: float) -> float:
    """Return the half cosine from 1 at iteration 0 to `final` at iteration `total` and after."""
    progress = min(1.0, iteration / max(total, 1))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def stop_at(iteration: int, stop: int) -> float:
    """Return 1 before iteration `stop` and 0 from it on; always 1 if `stop` is negative."""
    return 0.0 if 0 <= stop <= iteration else 1.0


def piecewise(iteration: int, steps: Sequence[int], factors: Sequence[float]) -> float:
    """Return 1 before steps[0], then factors[i] from steps[i] on."""
    factor = 1.0
    for step, value in zip(steps, factors, strict=True):
        if iteration >= step:
            factor = value
    return factor


@dataclass(frozen=True)
class Schedule:
    """
    The weight of a distiller at every iteration.

    Attributes:
        weight: the full weight.
        total: iterations of the whole run, where the cosine ends.
        warmup_iters, decay, final_factor, stop, steps, factors: see `KD.<DISTILLER>.SCHEDULE`.

    Raises:
        ValueError: at construction, on values that make no schedule.
    """

    weight: float
    total: int
    warmup_iters: int = 0
    decay: str = "constant"
    final_factor: float = 0.0
    stop: int = -1
    steps: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"A distiller's WEIGHT must be finite and >= 0, found {self.weight}.")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(
                f"SCHEDULE.DECAY is {self.decay!r}, expected 'constant', 'cosine' or 'auto'."
            )
        if len(self.steps) != len(self.factors):
            raise ValueError(
                f"SCHEDULE.STEPS has {len(self.steps)} entries and FACTORS {len(self.factors)}; "
                "each step needs one factor."
            )
        for name, values in (("FINAL_FACTOR", [self.final_factor]), ("FACTORS", self.factors)):
            if not all(math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(
                    f"SCHEDULE.{name} must be finite and >= 0, found {', '.join(map(str, values))}."
                )
        if list(self.steps) != sorted(self.steps):
            raise ValueError(f"SCHEDULE.STEPS must ascend, found {list(self.steps)}.")

    @classmethod
    def from_config(cls, node: CfgNode, total: int) -> "Schedule":
        """Build from a distiller's node and SOLVER.MAX_ITER; weight 1 where it is automatic."""
        schedule = node.SCHEDULE
        automatic = node.WEIGHT is None
        decay = schedule.DECAY
        if decay == "auto":
            decay = "cosine" if automatic else "constant"
        return cls(
            weight=1.0 if automatic else float(node.WEIGHT),
            total=total,
            warmup_iters=schedule.WARMUP_ITERS,
            decay=decay,
            final_factor=schedule.FINAL_FACTOR,
            stop=schedule.STOP_AT,
            steps=tuple(schedule.STEPS),
            factors=tuple(schedule.FACTORS),
        )

    @classmethod
    def of(cls, name: str, cfg: CfgNode) -> "Schedule":
        """
        Build that of an entry of KD.DISTILLERS from the full config.

        Raises:
            ValueError: values that make no schedule; the message names the distiller's node.
        """
        node = node_name(name)
        try:
            return cls.from_config(cfg.KD[node], cfg.SOLVER.MAX_ITER)
        except ValueError as error:
            raise ValueError(f"KD.{node}: {error}") from error

    def has_stopped(self, iteration: int) -> bool:
        """Return whether the weight is 0 from this iteration on by STOP_AT."""
        return stop_at(iteration, self.stop) == 0

    def __call__(self, iteration: int) -> float:
        """Return the weight at an iteration (0 is the first)."""
        weight = self.weight * linear_warmup(iteration, self.warmup_iters)
        if self.decay == "cosine":
            weight *= cosine_decay(iteration, self.total, self.final_factor)
        return (
            weight * piecewise(iteration, self.steps, self.factors) * stop_at(iteration, self.stop)
        )
