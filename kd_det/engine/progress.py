"""Files that tell others how a run is going and what came of it."""

import json
import os
import statistics
import sys
import time
from typing import Any

import torch
from detectron2.engine import HookBase


def write_json(path: str, content: Any) -> None:
    """Write a JSON file whole: under a temporary name first, then renamed."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".part", path)


class ProgressFile(HookBase):
    """
    Keeps `progress.json` up to date: iteration, max_iter, phase, eta_seconds.

    Args:
        output_dir: folder of the run.
        period: seconds between updates.
    """

    def __init__(self, output_dir: str, period: float = 1.0) -> None:
        self._path = os.path.join(output_dir, "progress.json")
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
        write_json(self._path, {**content, "eta_seconds": eta})


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
        result = {
            "metrics": getattr(self.trainer, "_last_eval_results", {}),
            "sec_per_step": statistics.median(seconds) if seconds else None,
            "peak_memory_mb": peak_memory_mb(),
            "iterations": self.trainer.max_iter,
            "seed": self._seed,
        }
        write_json(os.path.join(self._folder, "result.json"), result)
        progress = {"iteration": self.trainer.max_iter, "max_iter": self.trainer.max_iter}
        write_json(
            os.path.join(self._folder, "progress.json"),
            {**progress, "phase": "done", "eta_seconds": 0.0},
        )


def peak_memory_mb() -> float:
    """Return the peak of allocated GPU memory in MiB; without a GPU, of the process's own memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
