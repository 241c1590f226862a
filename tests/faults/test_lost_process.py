"""One process of several is killed: the others end, say so, and the run goes on when repeated."""

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.conftest import Tiny, equal_checkpoints, outcome
from faults.nursery import Nursery, words

from kd_det.reading import what_damages

pytestmark = pytest.mark.faults
Note = Callable[[str, object], None]
# Seconds. A process that waits for one that is gone hears of it when the connection closes.
PATIENCE = 300


def start(children: Nursery, config: Path, out: Path) -> list[int]:
    """Start two processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common["LOCAL_WORLD_SIZE"] = "2"
    return [
        children.start(*words(config, out), env={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_one_process_is_killed(
    tiny: Tiny, children: Nursery, tmp_path: Path, lost: int, record_property: Note
) -> None:
    random.seed(lost)
    begun = time.monotonic()
    for pid in start(children, tiny.config, tmp_path / "whole"):
        assert children.wait(pid, PATIENCE) == 0, children.said()
    length = time.monotonic() - begun
    kills = 0
    while True:
        pids = start(children, tiny.config, tmp_path / "out")
        if kills == 3:
            assert [children.wait(pid, PATIENCE) for pid in pids] == [0, 0], children.said()
            break
        time.sleep(random.uniform(0.2, 0.8) * length)
        children.kill(pids[lost])
        kills += 1
        other = children.wait(pids[1 - lost], PATIENCE)
        assert other is not None, "the other process hangs"
        for file in (tmp_path / "out").glob("*.pth"):
            assert what_damages(file) == ""
    folders = tmp_path / "whole", tmp_path / "out"
    assert outcome(folders[0]) == outcome(folders[1])
    assert equal_checkpoints(*(folder / "model_final.pth" for folder in folders))
    record_property("tried", f"{kills} times rank {lost} of two killed: resumed to the same end")
