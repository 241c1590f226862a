"""A bit of a checkpoint changes on the disk: it is refused, or nothing of it has changed."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
from faults.conftest import Tiny
from faults.nursery import Nursery, words

from kd_det.checkpoint import KDCheckpointer
from kd_det.reading import load_checkpoint

pytestmark = pytest.mark.faults
Note = Callable[[str, object], None]
FLIPS = 300


def flip(file: Path, at: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_flipped_bits(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Note
) -> None:
    """At 300 places, a third of them in the directory at the end: never other weights."""
    random.seed(2)
    for name in ("model_0000008.pth", "model_final.pth"):
        shutil.copy(tiny.reference / name, tmp_path)
    last, before = tmp_path / "model_final.pth", tmp_path / "model_0000008.pth"
    good = last.read_bytes()
    expected = dict(torch.load(last, weights_only=True))
    checkpointer = KDCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    refused = harmless = 0
    for number in range(FLIPS):
        begin = len(good) - 9000 if number % 3 == 0 else 0
        last.write_bytes(good)
        flip(last, random.randrange(begin, len(good)), random.randrange(8))
        try:
            found = dict(load_checkpoint(last))
        except Exception:  # as it is read everywhere
            refused += 1
            with caplog.at_level(logging.CRITICAL):
                assert checkpointer.last_readable() == str(before)
        else:
            harmless += 1
            assert tiny_runs.equal_states(found, expected)
    assert refused > harmless
    record_property(
        "tried", f"{FLIPS} flipped bits: {refused} refused, {harmless} in padding, none unnoticed"
    )


@pytest.mark.parametrize("place", ["last", "all", "teacher"])
def test_a_run_with_a_flipped_bit(
    tiny: Tiny, children: Nursery, tmp_path: Path, place: str, record_property: Note
) -> None:
    """Resumed from the one before, or told; a teacher's is told with its file."""
    out = tmp_path / "run"
    shutil.copytree(tiny.reference, out)
    (out / "result.json").unlink()
    files = sorted(out.glob("model_*.pth"))
    for file in {"last": files[-1:], "all": files, "teacher": []}[place]:
        flip(file, file.stat().st_size // 2, 3)
    more: list[str] = []
    if place == "teacher":
        weights = tmp_path / "teacher.pth"
        shutil.copy(tiny.config.parent / "fcos.pth", weights)
        flip(weights, weights.stat().st_size // 2, 3)
        more = ["KD.TEACHER.WEIGHTS", str(weights)]
    children.log.unlink()
    code = children.run(*words(tiny.config, out, *more))
    said = children.log.read_text()
    if place == "last":
        assert code == 0, said
        assert f"Checkpoint {files[-1]} is damaged" in said
        assert tiny.same(out)
    else:
        assert code == 1
        named = "None of the checkpoints" if place == "all" else f"{more[1]} could not be read"
        assert named in " ".join(said.splitlines()[-2:])
    record_property("tried", f"a flipped bit in {place}: {'resumed' if code == 0 else 'told'}")
