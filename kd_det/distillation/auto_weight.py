"""
The weight that gives a distiller a wanted share of the pull on the student's captured features.

    w = clamp(SHARE / exp(median_t m_t), LOW, HIGH)

m_t is the log ratio of the distiller's pull at unit weight to that of the detection losses at step
t (`distillation.pull`). It is measured in the first steps after START and then frozen: a weight
that followed it for ever would grow without bound as the student approaches its teacher, and undo
every schedule.
"""

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from kd_det.distillation.pull import Reading

_logger = logging.getLogger(__name__)

LOW, HIGH = 1e-9, 1e6
# Steps, in units of STEPS, after which a distiller without any gradient is given up.
PATIENCE = 10
# Measurements that differ by more than this factor hardly have a median.
_WIDE_SPREAD = 100.0

Phase = Literal["waiting", "measuring", "frozen"]


def default_start(max_iter: int) -> int:
    """Return the active iterations before the first measurement: the student's first are wild."""
    return min(500, max_iter // 100)


class AutoWeight:
    """
    The automatic weight of one distiller.

    In every iteration at which its schedule is above 0, the caller looks at `phase`: "waiting", the
    distiller rests and `wait()` counts the iteration; "measuring", its reading goes to `add()`
    first, then `weight` is that of this iteration; "frozen", `weight` stays.

    Args:
        name: the distiller's key under KD, for messages.
        captures: the student's module paths it captures, for messages.
        share: wanted ratio of the two pulls, above 0.
        start: active iterations before the first measurement, see `default_start`.
        steps: valid measurements until the weight is frozen, at least 1.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self, *, name: str, captures: Sequence[str], share: float, start: int, steps: int = 50
    ) -> None:
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"KD.{name}.SHARE is {share}, expected a number above 0.")
        if start < 0 or steps < 1:
            raise ValueError(
                f"KD.{name}: automatic weights start after {start} iterations and measure {steps}; "
                "expected at least 0 and 1."
            )
        self.name = name
        self.captures = tuple(captures)
        self.share = share
        self.start = start
        self.steps = steps
        self._seen = 0
        self._measured: list[float] = []
        self._median: float | None = None
        self._warned: set[str] = set()

    @property
    def phase(self) -> Phase:
        """What to do in an iteration at which the schedule is above 0."""
        if self._median is not None:
            return "frozen"
        return "waiting" if self._seen < self.start else "measuring"

    @property
    def weight(self) -> float:
        """The weight by what was measured so far; 0 before the first valid measurement."""
        median = self._running_median()
        if median is None:
            return 0.0
        log_weight = math.log(self.share) - median
        # Compared as logarithms: exp of a large one overflows.
        if log_weight <= math.log(LOW):
            return LOW
        return HIGH if log_weight >= math.log(HIGH) else self.share * math.exp(-median)

    def wait(self) -> None:
        """Count an iteration in which the distiller rests before its first measurement."""
        self._seen += 1

    def add(self, reading: Reading) -> None:
        """
        Take one step's measurement; a step without a finite ratio counts for patience alone.

        Raises:
            RuntimeError: nothing valid in `PATIENCE` times `steps` iterations.
        """
        self._seen += 1
        if reading.log_ratio is not None:
            self._measured.append(reading.log_ratio)
            self._warn_if_clamped(reading)
        elif not self._measured and self._seen - self.start >= PATIENCE * self.steps:
            raise RuntimeError(
                f"KD.{self.name}.SHARE: its loss has no gradient at {', '.join(self.captures)} (or "
                f"the detection losses have none, or one is not finite) in any of "
                f"{PATIENCE * self.steps} iterations; last norms {reading.distilled:.3g} and "
                f"{reading.detection:.3g}. Set WEIGHT instead."
            )
        if len(self._measured) >= self.steps:
            self._freeze()

    def stop(self) -> None:
        """Freeze by what was measured, since the schedule has ended; warn if nothing was."""
        if self._median is not None:
            return
        if self._measured:
            self._freeze()
        elif "stop" not in self._warned:
            self._warned.add("stop")
            _logger.warning(
                "KD.%s: its schedule stopped before its automatic weight was measured; it was "
                "never active. Raise SCHEDULE.STOP_AT, or set WEIGHT.",
                self.name,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured: not the weight, which follows from it and from the share."""
        return {
            "share": self.share,
            "seen": self._seen,
            "measured": list(self._measured),
            "median": self._median,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped; with another share, the weight is scaled exactly."""
        self._seen = int(state["seen"])
        self._measured = [float(value) for value in state["measured"]]
        self._median = None if state["median"] is None else float(state["median"])
        if state["share"] != self.share:
            _logger.info(
                "KD.%s.SHARE is now %g, it was %g; its automatic weight is scaled accordingly.",
                self.name,
                self.share,
                state["share"],
            )
        if self._median is None and len(self._measured) >= self.steps:
            self._freeze()

    def _running_median(self) -> float | None:
        if self._median is not None or not self._measured:
            return self._median
        return statistics.median(self._measured)

    def _freeze(self) -> None:
        self._median = statistics.median(self._measured)
        spread = max(self._measured) - min(self._measured)
        _logger.info(
            "KD.%s: automatic weight %.4g (log %.3f) for a share of %g, from %d measurements: "
            "median of the log ratio at unit weight %.3f, spread %.3f.",
            self.name,
            self.weight,
            math.log(self.weight),
            self.share,
            len(self._measured),
            self._median,
            spread,
        )
        if spread > math.log(_WIDE_SPREAD):
            _logger.warning(
                "KD.%s: the pull of its loss varied by a factor of %.3g while its weight was "
                "measured; raise the STEPS of the measurement, or set WEIGHT.",
                self.name,
                math.exp(spread),
            )

    def _warn_if_clamped(self, reading: Reading) -> None:
        if self.weight not in (LOW, HIGH) or "clamp" in self._warned:
            return
        self._warned.add("clamp")
        _logger.warning(
            "KD.%s: its automatic weight is held at %g: at unit weight its pull is %.3g times that "
            "of the detection losses (norms %.3g and %.3g).",
            self.name,
            self.weight,
            math.exp(statistics.median(self._measured)),
            reading.distilled,
            reading.detection,
        )
