"""
Trainings as processes of their own that start at once, so that killing fifty takes minutes.

A server imports kd_det a single time and forks a process for each training. It has no threads then,
and has computed nothing: the forked process is what `python -m kd_det.engine` is after its imports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, sys
import kd_det
from kd_det.engine.console import plain_errors
from kd_det.engine.main import main
import kd_det.engine.trainer, kd_det.evaluation.coco, kd_det.evaluation.crowdhuman

print("ready", flush=True)
children = {}
for line in sys.stdin:
    job = json.loads(line)
    if "argv" in job:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.environ.update(job["env"])
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                with plain_errors():
                    main(job["argv"])
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
    else:
        done, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
"""


class Nursery:
    """Starts trainings and says how they ended."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def _ask(self, **job: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> int:
        """Start `train_net.py` with these words; return the process's id."""
        pid: int = self._ask(argv=[*map(str, argv)], env={**(env or {})}, log=str(self.log))
        return pid

    def wait(self, pid: int, seconds: float = 120) -> int | None:
        """Return a process's exit code, or None if it still runs after that time."""
        deadline = time.monotonic() + seconds
        while True:
            code: int | None = self._ask(poll=pid)
            if code is not None or time.monotonic() > deadline:
                return code
            time.sleep(0.005)

    def run(self, *argv: str | Path, seconds: float = 120) -> int:
        """Run to the end; a hang is a failure."""
        pid = self.start(*argv)
        code = self.wait(pid, seconds)
        if code is None:
            self.kill(pid)
            raise AssertionError(f"still running after {seconds} s; {self.said()}")
        return code

    def kill(self, pid: int) -> None:
        """End a process as kill -9 does."""
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def said(self) -> str:
        """Return the end of what all of them printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-3000:]

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """A server for one test."""
    made = Nursery(folder / "trainings.log")
    try:
        yield made
    finally:
        made.close()


def words(config: Path, out: Path, *more: str) -> Sequence[str]:
    """The command line of a training into a folder, resumed where there is something to resume."""
    return ["--config-file", str(config), "--resume", "OUTPUT_DIR", str(out), *more]
