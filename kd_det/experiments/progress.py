"""How far a whole recipe is, and how long the rest will take."""

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

from kd_det.experiments.plan import Run

# Start of the process (imports, data) and evaluation together, until they were measured.
_OVERHEAD_SECONDS = 20.0
# A student's time per iteration over its teacher's, until one was measured: a smaller model, which
# pays for the teacher's forward pass.
_STUDENT_SHARE = 0.6
_LINE_PERIOD_SECONDS = 15.0
_BAR = "{percentage:3.0f}% |{bar:24}| {desc}"


class Estimator:
    """
    Keeps what is known of every run's speed, and works out the recipe's progress from it.

    Args:
        runs: all runs of the recipe.
        jobs: number of students trained at a time.
    """

    def __init__(self, runs: Sequence[Run], jobs: int) -> None:
        self._runs = list(runs)
        self._jobs = jobs
        self._seconds_per_iteration: dict[Run, float] = {}
        self._iteration: dict[Run, int] = {}
        self._phase: dict[Run, str] = {}
        self._began: dict[Run, float] = {}
        self._overheads: list[float] = []
        self._finished: set[Run] = set()

    def start(self, run: Run) -> None:
        """Take note that a run was started."""
        self._began[run] = time.monotonic()

    def seconds(self, run: Run) -> float:
        """Return the time since a run was started."""
        return time.monotonic() - self._began[run]

    def observe(self, run: Run, progress: dict[str, Any] | None) -> None:
        """Take in a run's progress.json: iteration, max_iter, phase, eta_seconds."""
        if not progress:
            return
        iteration, left = progress["iteration"], progress["max_iter"] - progress["iteration"]
        self._iteration[run] = iteration
        self._phase[run] = progress["phase"]
        if progress["phase"] == "train" and progress["eta_seconds"] and left > 0:
            self._seconds_per_iteration[run] = progress["eta_seconds"] / left

    def finish(self, run: Run, result: dict[str, Any], seconds: float | None) -> None:
        """Take in a run's result.json and, unless it was kept from before, its duration."""
        self._finished.add(run)
        if result.get("sec_per_step") and run.iterations:
            self._seconds_per_iteration[run] = result["sec_per_step"]
            if seconds is not None:
                training = result["sec_per_step"] * run.iterations
                # A run that was continued trained for a part of its iterations only.
                self._overheads.append(max(0.0, seconds - training) or _OVERHEAD_SECONDS)

    def fraction(self) -> float:
        """Return the finished share of the whole work, 0 to 1."""
        total = sum(self._total(run) for run in self._runs)
        return 1 - sum(self._left(run) for run in self._runs) / total if total else 1.0

    def eta(self) -> float | None:
        """Return the seconds left; None until a first speed was measured."""
        if not self._seconds_per_iteration:
            return None
        alone = sum(self._left(run) for run in self._runs if run.is_teacher)
        rest = sum(self._left(run) for run in self._runs if not run.is_teacher)
        return max(alone + rest / self._jobs, max(self._path(run) for run in self._runs))

    def running(self) -> list[str]:
        """Return a word on each run under way."""
        return [
            f"{run.title} {self._iteration.get(run, 0)}/{run.iterations}"
            if run.iterations and self._phase.get(run) != "eval"
            else f"{run.title} evaluation"
            for run in self._began
            if run not in self._finished
        ]

    def _path(self, run: Run) -> float:
        """Return the seconds until a run can be over, by what it waits for."""
        return self._left(run) + max((self._path(other) for other in run.needs), default=0.0)

    def _total(self, run: Run) -> float:
        return self._speed(run) * run.iterations + self._overhead()

    def _left(self, run: Run) -> float:
        if run in self._finished:
            return 0.0
        if self._phase.get(run) in ("eval", "done"):
            return 0.5 * self._overhead()
        started = 0.5 if self._iteration.get(run) else 1.0
        done = self._iteration.get(run, 0)
        return self._speed(run) * (run.iterations - done) + started * self._overhead()

    def _overhead(self) -> float:
        if not self._overheads:
            return _OVERHEAD_SECONDS
        return sum(self._overheads) / len(self._overheads)

    def _speed(self, run: Run) -> float:
        """Return seconds per iteration: the run's own, its arm's, its kind's, or a guess."""
        known = self._seconds_per_iteration
        if run in known:
            return known[run]
        same_arm = [v for r, v in known.items() if r.name == run.name]
        same_kind = [v for r, v in known.items() if r.is_teacher == run.is_teacher]
        pool = same_arm or same_kind
        if pool:
            return sum(pool) / len(pool)
        if not known:
            return 1.0
        mean = sum(known.values()) / len(known)
        return mean / _STUDENT_SHARE if run.is_teacher else mean * _STUDENT_SHARE


class Display:
    """
    One progress bar for the whole recipe on a terminal; a line now and then elsewhere.

    Args:
        stream: where to write, standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._began = time.monotonic()
        self._last_line = self._began
        self._shown = 0.0
        self._bar = (
            tqdm(total=100, file=self._stream, bar_format=_BAR, leave=False)
            if self._stream.isatty()
            else None
        )

    def update(self, estimator: Estimator) -> None:
        """Show the state of the recipe."""
        # Estimates change as speeds get known; what was shown as done stays done.
        self._shown = max(self._shown, 100 * estimator.fraction())
        eta = estimator.eta()
        elapsed = time.monotonic() - self._began
        status = (
            f"{clock(elapsed)} elapsed, {clock(eta) if eta is not None else '?'} left"
            f" | {', '.join(estimator.running())}"
        )
        if self._bar is not None:
            self._bar.n = round(self._shown, 1)
            self._bar.set_description_str(status)
        elif time.monotonic() - self._last_line >= _LINE_PERIOD_SECONDS:
            self._last_line = time.monotonic()
            self.line(f"[{self._shown:3.0f} %] {status}")

    def finished(self, run: Run, result: dict[str, Any], seconds: float | None) -> None:
        """Write the line of a finished run; `seconds` is None for one kept from before."""
        ap = result["metrics"]["bbox"]["AP"]
        when = "kept" if seconds is None else f"done in {clock(seconds)}"
        self.line(f"{run.title}: AP {'none' if ap is None else f'{ap:.1f}'} ({when})")

    def line(self, text: str) -> None:
        """Write a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
