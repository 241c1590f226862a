"""Interrupted trainings save first, end with their parents, and leave their folders free."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from kd_det.engine import ending
from kd_det.engine.folder_lock import claimed
from kd_det.engine.trainer import DistillationTrainer
from kd_det.experiments.plan import Run
from kd_det.experiments.progress import Display
from kd_det.experiments.runs import execute

Student = Callable[..., CfgNode]


class Signal(HookBase):
    """Sends this process signals within a step."""

    def __init__(self, number: int, at: int, times: int = 1) -> None:
        self.number, self.at, self.times = number, at, times

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def interrupted(cfg: CfgNode, hook: HookBase) -> None:
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    tiny_runs.seed_all_rng(cfg.SEED)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([hook])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops(
    tiny_student: Student, tiny_teacher: Any, number: int
) -> None:
    before = signal.getsignal(number)
    whole = tiny_student("fcos", tiny_teacher("fcos"), {"SOLVER.MAX_ITER": 4}, name="whole")
    parts = tiny_student("fcos", tiny_teacher("fcos"), {"SOLVER.MAX_ITER": 4}, name="parts")
    tiny_runs.train(whole)
    interrupted(parts, Signal(number, at=1))
    assert signal.getsignal(number) is before
    folder = Path(parts.OUTPUT_DIR)
    assert [file.name for file in folder.glob("*.pth")] == ["model_0000001.pth"]
    assert not (folder / "result.json").exists()
    trainer, _ = tiny_runs.train(parts, resume=True)
    assert trainer.start_iter == 2
    a, b = (torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth")) for cfg in (whole, parts))
    assert all(tiny_runs.equal_states(a[key], b[key]) for key in ("model", "kd", "trainer"))


def test_a_second_one_stops_at_once(tiny_student: Student) -> None:
    cfg = tiny_student("fcos")
    interrupted(cfg, Signal(signal.SIGINT, at=1, times=2))
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.pth"))


@pytest.mark.parametrize("asked_elsewhere", [False, True])
def test_several_processes_stop_after_the_same_step(
    tiny_student: Student, monkeypatch: pytest.MonkeyPatch, asked_elsewhere: bool
) -> None:
    """Whichever of them was asked, here between the second and the third question."""
    questions: list[float] = []

    def add_the_other(value: torch.Tensor) -> torch.Tensor:
        questions.append(value.item())
        return value + float(asked_elsewhere and len(questions) == 3)

    cfg = tiny_student("fcos", None, {"SOLVER.MAX_ITER": 9})
    monkeypatch.setattr(ending, "_STEPS_BETWEEN_QUESTIONS", 2)
    monkeypatch.setattr(ending, "sum_over_processes", add_the_other)

    monkeypatch.setattr(ending, "comm", types.SimpleNamespace(get_world_size=lambda: 2))
    if asked_elsewhere:
        interrupted(cfg, HookBase())
    else:
        interrupted(cfg, Signal(signal.SIGINT, at=4))
    assert questions == [0.0, 0.0, 0.0 if asked_elsewhere else 1.0]
    assert [file.name for file in Path(cfg.OUTPUT_DIR).glob("*.pth")] == ["model_0000005.pth"]


def start(script: str, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def stop(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_folder_is_held_until_its_process_dies(tmp_path: Path) -> None:
    script = """
        import sys, time
        from kd_det.engine.folder_lock import claimed
        with claimed(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = start(script, str(tmp_path))
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = rf"training \(process {holder.pid}\) writes into {tmp_path}; .*OUTPUT_DIR"
        with pytest.raises(RuntimeError, match=message), claimed(str(tmp_path), patience=0.3):
            pass
    finally:
        stop(holder)
    with claimed(str(tmp_path), patience=5):
        pass


def test_runs_end_with_a_comparison_that_is_killed(tmp_path: Path) -> None:
    """By kill -9 no handler runs; the closed pipe tells."""
    run = "from kd_det.engine.ending import end_with_parent as e; e(); import os, sys, time;"
    run += "print('pid', os.getpid(), flush=True); time.sleep(120)"
    script = """
        import sys, time
        from pathlib import Path
        from kd_det.experiments.plan import Run
        from kd_det.experiments.progress import Display
        from kd_det.experiments.runs import execute
        out = Path(sys.argv[1])
        run = Run("arm", 0, out, out / "config.yaml", (), 4)
        execute([run], 1, Display(), [sys.executable, "-c", sys.argv[2]])
    """
    parent = start(script, str(tmp_path), run)
    try:
        pid = wait_for(lambda: _word_after(tmp_path / "run.log", "pid"), seconds=120)
    finally:
        stop(parent)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or _is_dead(int(pid)), seconds=20)


def test_an_interrupted_run_keeps_its_workers_until_it_has_ended(tmp_path: Path) -> None:
    """A training that ends its step still loads data; what outlives it is killed."""
    script = f"""
        import pathlib, signal, subprocess, sys, time
        out = pathlib.Path({str(tmp_path)!r})
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        def end(number, frame):
            time.sleep(0.3)
            (out / "at_the_end").write_text(str(worker.poll()))
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        (out / "worker").write_text(str(worker.pid))
        time.sleep(60)
    """

    class Interrupting(Display):
        def update(self, estimator: Any) -> None:
            if (tmp_path / "worker").exists():
                raise KeyboardInterrupt

    run = Run("arm", 0, tmp_path / "run", tmp_path / "config.yaml", (), 4)
    with pytest.raises(KeyboardInterrupt):
        execute([run], 1, Interrupting(), [sys.executable, "-c", textwrap.dedent(script)])
    assert (tmp_path / "at_the_end").read_text() == "None"  # it was still running
    pid = int((tmp_path / "worker").read_text())
    wait_for(lambda: _is_dead(pid), seconds=20)


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def _word_after(file: Path, word: str) -> str:
    words = file.read_text().split() if file.exists() else []
    return words[words.index(word) + 1] if word in words[:-1] else ""


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Where nobody reaps orphans they stay as zombies.
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"


class TestScript:
    """train_net.py as users start it."""

    def run(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
        script = tiny_runs.BASE.parents[1] / "train_net.py"
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code

    def test_an_error_is_its_message_and_the_log_has_the_rest(
        self,
        tiny_data: dict[str, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for logger in map(logging.getLogger, ("kd_det", "detectron2", "fvcore")):
            monkeypatch.setattr(logger, "handlers", [])
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {"SOLVER.BASE_LR": 1e30})
        words = ("--config-file", str(path), "SOLVER.MAX_ITER", "9", "SOLVER.WARMUP_ITERS", "0")
        assert self.run(monkeypatch, *words) == 1
        shown = capsys.readouterr()
        log = tmp_path / "run" / "log.txt"
        assert "Traceback" not in shown.out + shown.err
        assert "\x1b[" not in shown.out + shown.err
        *_, message, where = shown.err.strip().splitlines()
        assert message.startswith("FloatingPointError: ") and "iteration" in message
        assert where == f"The traceback is in {log}."
        text = log.read_text()
        assert "Traceback" in text and "run_step" in text and "\x1b[" not in text

    def test_a_wrong_key_is_its_message(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for logger in map(logging.getLogger, ("kd_det", "detectron2", "fvcore")):
            monkeypatch.setattr(logger, "handlers", [])
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {})
        path.write_text(path.read_text().replace("MAX_ITER", "MAXITER"))
        assert self.run(monkeypatch, "--config-file", str(path)) == 1
        err = capsys.readouterr().err
        assert "KeyError: " in err and "SOLVER.MAX_ITER" in err and "Traceback" not in err

    def test_an_interruption_says_how_to_go_on(
        self,
        tiny_data: dict[str, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        step = DistillationTrainer.run_step

        def interrupt(trainer: DistillationTrainer) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            step(trainer)

        monkeypatch.setattr(DistillationTrainer, "run_step", interrupt)
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {})
        assert self.run(monkeypatch, "--config-file", str(path)) == 130
        assert "Continue with --resume" in capsys.readouterr().err
        content = torch.load(tmp_path / "run" / "model_0000000.pth")
        assert content["iteration"] == 0
        assert json.loads((tmp_path / "run" / "progress.json").read_text())["phase"] != "done"
