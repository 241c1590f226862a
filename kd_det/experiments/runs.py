"""Carries out the runs of a plan as subprocesses, several at a time, and keeps what is finished."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from kd_det.checkpoint.damaged import set_damaged_aside
from kd_det.engine.ending import PARENT_PIPE
from kd_det.experiments.digests import checkpoint_damage
from kd_det.experiments.finished import (
    made_from_others,
    note_inputs,
    read_result,
    set_aside,
    what_lacks,
)
from kd_det.experiments.plan import Run
from kd_det.experiments.progress import Display, Estimator
from kd_det.files import read_json

# A training run by kd_det's engine; takes train_net.py's arguments.
RUNNER = (sys.executable, "-m", "kd_det.engine")
# OpenMP threads wait for each other spinning. On cores that others use as well, that keeps a slower
# one from the very core it needs; with a short spin a step takes half the time there.
_PATIENT_THREADS = {"GOMP_SPINCOUNT": "10000"}
_OWN = {PARENT_PIPE: "1"}
_LOG_LINES = 25
# A step and a checkpoint.
_GRACE_SECONDS = 30.0


class RunFailed(RuntimeError):
    """A run stopped without a result; the message has the end of its log and how to go on."""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def execute(
    runs: Sequence[Run],
    jobs: int,
    display: Display,
    runner: Sequence[str] | None = None,
    poll_seconds: float = 0.2,
) -> None:
    """
    Carry out all runs that have no result yet.

    Args:
        runs: in an order in which each follows those it needs. Teachers run alone, with all cores.
        jobs: number of runs at a time.
        display: shows progress.
        runner: command of a run, to which its arguments are appended; None: the engine.
        poll_seconds: time between looks at the subprocesses.

    Raises:
        RunFailed: a run failed; the others are stopped, and continue when the command is repeated.
    """
    queue = _Queue(runs, jobs, display, runner or RUNNER)
    try:
        while not queue.done():
            queue.start_ready()
            time.sleep(poll_seconds)
            queue.collect()
    finally:
        queue.stop()


class _Queue:
    """The subprocesses of an `execute` call."""

    def __init__(
        self, runs: Sequence[Run], jobs: int, display: Display, runner: Sequence[str]
    ) -> None:
        self.jobs = jobs
        self.display = display
        self.runner = list(runner)
        self.estimator = Estimator(runs, jobs)
        self.pending: list[Run] = []
        self.active: dict[Run, subprocess.Popen[bytes]] = {}
        for run in runs:
            result = read_result(run)
            if result is None:
                if (run.folder / "result.json").exists() and not made_from_others(run):
                    display.line(f"{run.title}: {what_lacks(run)}; that part is done again")
                self.pending.append(run)
            else:
                self.estimator.finish(run, result, seconds=None)
                display.finished(run, result, seconds=None)

    def done(self) -> bool:
        return not self.pending and not self.active

    def start_ready(self) -> None:
        """Start what may run now, in order; nothing overtakes a teacher that waits."""
        for run in list(self.pending):
            alone = run.is_teacher or any(other.is_teacher for other in self.active)
            if len(self.active) >= (1 if alone else self.jobs):
                break
            if all(other not in self.pending and other not in self.active for other in run.needs):
                self.pending.remove(run)
                self.active[run] = self._start(run)

    def _start(self, run: Run) -> "subprocess.Popen[bytes]":
        if reason := made_from_others(run):
            self.display.line(f"{run.title}: {reason}; now in {set_aside(run).name}, done afresh")
        run.folder.mkdir(parents=True, exist_ok=True)
        for sentence in set_damaged_aside(run.folder, checkpoint_damage):
            self.display.line(f"{run.title}: {sentence}")
        note_inputs(run)
        (run.folder / "progress.json").unlink(missing_ok=True)  # of an attempt that was stopped
        threads = cores() if run.is_teacher else max(1, cores() // self.jobs)
        self.estimator.start(run)
        with open(run.folder / "run.log", "ab") as log:
            return subprocess.Popen(
                [*self.runner, *run.arguments()],
                stdin=subprocess.PIPE,  # it ends with the one that holds the other end
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_PATIENT_THREADS, **os.environ, **_OWN, "OMP_NUM_THREADS": str(threads)},
                # A group of its own: Ctrl-C reaches it by `stop`, and its data-loading workers.
                start_new_session=True,
            )

    def collect(self) -> None:
        """Take in progress and results; raise at the first failure."""
        for run, process in list(self.active.items()):
            code = process.poll()
            if code is None:
                self.estimator.observe(run, read_json(run.folder / "progress.json"))
                continue
            del self.active[run]
            _close_pipe(process)
            result = read_result(run)
            if code != 0 or result is None:
                raise RunFailed(_failure(run, code))
            self.estimator.finish(run, result, self.estimator.seconds(run))
            self.display.finished(run, result, self.estimator.seconds(run))
        self.display.update(self.estimator)

    def stop(self) -> None:
        """End all subprocesses, and theirs."""
        for process in self.active.values():
            # To it alone: it ends its data-loading workers itself, and needs them until then.
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self.active.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            _kill_group(process)  # workers may outlive the process that started them
            process.wait()
            _close_pipe(process)
        self.active.clear()


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _close_pipe(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _failure(run: Run, code: int) -> str:
    log = run.folder / "run.log"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    what = f"ended with exit code {code}" if code else "ended without writing its result.json"
    if not code and (run.folder / "result.json").exists():
        what = f"ended, but {what_lacks(run)}"
    return "\n".join(
        [
            f"The run {run.title} {what}. The end of {log}:",
            "",
            *(f"    {line}" for line in tail),
            "",
            "Repeat the same command once the cause is removed: finished runs are kept, and runs "
            "that were stopped continue from their last checkpoints.",
        ]
    )
