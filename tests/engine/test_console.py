"""What a training job shows its user, when even its log file cannot be written."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from kd_det.engine import console, launch
from kd_det.engine.job import Job


class FullDisk(io.StringIO):
    """A file on a disk without room."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[str]:
    """The name of a log file that cannot be written."""
    logger, name = logging.getLogger("kd_det"), str(tmp_path / "log.txt")
    handler = logging.StreamHandler(FullDisk(name))
    handler.setFormatter(logging.Formatter())
    logger.addHandler(handler)
    yield name
    logger.removeHandler(handler)


def test_a_log_that_cannot_be_written_is_told_once(
    log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.settle_handlers()
    with pytest.raises(SystemExit), console.plain_errors():
        logging.getLogger("kd_det").warning("one")
        logging.getLogger("kd_det").warning("two")
        raise OSError(28, "no room for model.pth")
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        f"{log} cannot be written ([Errno 28] No space left on device); it lacks what follows.",
        "",
        "OSError: [Errno 28] no room for model.pth",
    ]


def _fail(job: Any) -> None:
    raise FloatingPointError("the loss is nan")


def test_the_error_of_a_process_that_was_started_is_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with --num-gpus 2, but for the devices."""

    def start(main: Any, num: int, *rest: Any, dist_url: str, args: tuple[Any, ...]) -> None:
        torch.multiprocessing.start_processes(
            _take_rank, args=(main, args), nprocs=num, start_method="fork"
        )

    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {})
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "detectron2_launch", start)
    job = Job.from_command_line(["--config-file", str(path), "--num-gpus", "2"])
    with pytest.raises(SystemExit) as stop, console.plain_errors():
        launch.launch(_fail, job)
    assert stop.value.code == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("ended with FloatingPointError: the loss is nan")


def _take_rank(rank: int, main: Any, args: tuple[Any, ...]) -> None:
    main(*args)


def test_a_misspelled_key_leaves_no_traceback(tmp_path: Path) -> None:
    """In a process of its own, where no log is open yet: Python prints what no handler takes."""
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {})
    words = ["--config-file", str(path), "KD.SSIM.WIEGHT", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "kd_det.engine", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "KeyError: the command line: no config key is called KD.SSIM.WIEGHT" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_an_import_that_fails_is_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("kd_det"), "handlers", [])
    with pytest.raises(SystemExit), console.plain_errors():
        raise ImportError("KD.PLUGINS: 'nope' cannot be imported")
    assert capsys.readouterr().err == "\nImportError: KD.PLUGINS: 'nope' cannot be imported\n"
