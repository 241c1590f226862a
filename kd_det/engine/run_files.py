"""Files that tell others how a run is going and what came of it."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase

from kd_det.files import read_json, write_json


class ProgressFile(HookBase):
    """
    Keeps `progress.json` up to date: iteration, max_iter, phase, eta_seconds.

    Args:
        output_dir: folder of the run.
        period: seconds between updates.
    """

    def __init__(self, output_dir: str, period: float = 1.0) -> None:
        self._path = Path(output_dir, "progress.json")
        self._period = period
        self._written = 0.0
        self._start = 0.0

    def before_train(self) -> None:
        """Announce the run."""
        self._start = time.perf_counter()
        self._write(self.trainer.start_iter, "start")

    def after_step(self) -> None:
        """Update, at most once a period."""
        if time.perf_counter() - self._written >= self._period:
            self._write(self.trainer.iter + 1, "train")

    def after_train(self) -> None:
        """Say that the final evaluation begins, if training came to its end."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._write(self.trainer.max_iter, "eval")

    def _write(self, iteration: int, phase: str) -> None:
        now = time.perf_counter()
        self._written = now
        done = iteration - self.trainer.start_iter
        left = self.trainer.max_iter - iteration
        eta = (now - self._start) / done * left if done > 0 else None
        content = {"iteration": iteration, "max_iter": self.trainer.max_iter, "phase": phase}
        write_json(self._path, {**content, "eta_seconds": eta}, durable=False)


class RunResult(HookBase):
    """
    Writes `result.json` when a run has ended well: metrics, speed, memory.

    Args:
        output_dir: folder of the run.
        seed: the run's SEED, for the record.
    """

    # The first steps allocate memory and warm caches.
    _WARMUP_STEPS = 5

    def __init__(self, output_dir: str, seed: int) -> None:
        self._folder = output_dir
        self._seed = seed
        self._seconds: list[float] = []
        self._begun = 0.0

    def before_step(self) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def after_step(self) -> None:
        """Stop the clock; losses were read for logging, so the device has finished the step."""
        self._seconds.append(time.perf_counter() - self._begun)

    def after_train(self) -> None:
        """Write the file, unless training broke off."""
        if self.trainer.iter < self.trainer.max_iter:
            return
        seconds = self._seconds[self._WARMUP_STEPS :] or self._seconds
        # A finished run that is evaluated once more takes no step, but has taken them.
        before = read_json(Path(self._folder, "result.json")) or {}
        write_result(
            self._folder,
            metrics=getattr(self.trainer, "_last_eval_results", {}),
            seed=self._seed,
            iterations=self.trainer.max_iter,
            sec_per_step=(statistics.median(seconds) if seconds else before.get("sec_per_step")),
        )


def write_result(
    folder: str,
    *,
    metrics: dict[str, Any],
    seed: int,
    iterations: int,
    sec_per_step: float | None,
) -> None:
    """
    Write what came of a run to `result.json`, and to `progress.json` that it is done.

    Args:
        folder: the run's OUTPUT_DIR.
        metrics: by task.
        seed: the run's SEED.
        iterations: steps trained; 0 for an evaluation.
        sec_per_step: median of the steps' seconds, None without steps.
    """
    result = {
        "metrics": metrics,
        "sec_per_step": sec_per_step,
        "peak_memory_mb": peak_memory_mb(),
        "iterations": iterations,
        "seed": seed,
    }
    write_json(Path(folder, "result.json"), result)
    progress = {"iteration": iterations, "max_iter": iterations, "phase": "done"}
    write_json(Path(folder, "progress.json"), {**progress, "eta_seconds": 0.0})


def peak_memory_mb() -> float:
    """Return the peak of allocated GPU memory in MiB; without a GPU, of the process's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
