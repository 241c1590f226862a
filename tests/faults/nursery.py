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

# Comparisons start their trainings as commands: this one has them forked by the same server, hands
# over its own three streams, and stands for the training until it ends.
_STAND_IN = """
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    job = {"argv": sys.argv[2:], "env": dict(os.environ)}
    socket.send_fds(server, [json.dumps(job).encode()], [0, 1, 2])
    pid = int(server.recv(32))
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    sys.exit(int(server.recv(32) or 1))
"""
_SERVER = """
import json, os, selectors, socket, sys
import kd_det
from kd_det.engine.console import plain_errors
from kd_det.engine.ending import end_with_parent
from kd_det.engine.main import main
from kd_det.experiments import compare, runs
import kd_det.evaluation.coco, kd_det.evaluation.crowdhuman
import kd_det_cli

def train(job):
    end_with_parent()
    with plain_errors():
        main(job["argv"])
    return 0

def run_comparison(job):
    runs.RUNNER = (sys.executable, "-S", "-c", job["stand_in"], sys.argv[1])
    return kd_det_cli.main(["compare", *job["argv"]])

def fork(job, streams, work):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.update(job["env"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        code = work(job)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def from_test(line):
    job = json.loads(line)
    if "poll" in job:
        done, status = os.waitpid(job["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    pid = fork(job, [nothing, log, log], run_comparison if "stand_in" in job else train)
    os.close(log), os.close(nothing)
    return pid

def from_stand_in(caller):
    text, streams, _, _ = socket.recv_fds(caller, 2**20, 3)
    pid = fork(json.loads(text), streams, train)
    for stream in streams:
        os.close(stream)
    caller.send(str(pid).encode())
    return pid

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
selector = selectors.DefaultSelector()
selector.register(sys.stdin, selectors.EVENT_READ)
selector.register(listener, selectors.EVENT_READ)
callers = {}
print("ready", flush=True)
while True:
    for key, _ in selector.select(0.02 if callers else None):
        if key.fileobj is listener:
            caller = listener.accept()[0]
            callers[from_stand_in(caller)] = caller
        elif line := sys.stdin.readline():
            print(json.dumps(from_test(line)), flush=True)
        else:
            sys.exit()
    for pid, caller in list(callers.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            try:
                caller.send(str(os.waitstatus_to_exitcode(status)).encode())
            except BrokenPipeError:
                pass  # it was killed as well
            caller.close()
            del callers[pid]
"""


class Nursery:
    """Starts trainings and comparisons, and says how they ended."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(log.with_suffix(".socket"))],
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

    def compare(self, *argv: str | Path) -> int:
        """Start `kd-det compare` with these words; return the process's id."""
        words = [*map(str, argv)]
        pid: int = self._ask(argv=words, env={}, log=str(self.log), stand_in=_STAND_IN)
        return pid

    def wait(self, pid: int, seconds: float = 300) -> int | None:
        """Return a process's exit code, or None if it still runs after that time."""
        deadline = time.monotonic() + seconds
        while True:
            code: int | None = self._ask(poll=pid)
            if code is not None or time.monotonic() > deadline:
                return code
            time.sleep(0.005)

    def run(self, *argv: str | Path, seconds: float = 300) -> int:
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
