"""What a training job shows its user, when even its log file cannot be written."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_det.engine import console


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
