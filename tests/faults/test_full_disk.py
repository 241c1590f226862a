"""A full disk: the message names path and bytes, drafts go, the last good checkpoint stays."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.conftest import Tiny
from faults.nursery import Nursery, words

from kd_det.files import read_json
from kd_det.reading import what_damages

pytestmark = pytest.mark.faults
Note = Callable[[str, object], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB at first."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def test_a_disk_that_fills_up(
    tiny: Tiny, children: Nursery, disk: Path, record_property: Note
) -> None:
    """It gets a little larger each time, until the run fits; each time it says what happened."""
    out = disk / "run"
    size = (tiny.reference / "model_final.pth").stat().st_size // 1024
    needed = sum(file.stat().st_size for file in tiny.reference.rglob("*")) // 1024 + 64
    kinds = {"could not be written": 0, "No space left": 0}
    stops, kib = 0, 64
    while True:
        resize(disk, kib)
        children.log.unlink(missing_ok=True)
        code = children.run(*words(tiny.config, out))
        said = children.said()
        if code == 0:
            break
        told = " ".join(said.splitlines()[-2:])
        found = [kind for kind in kinds if kind in told]
        assert found and str(disk) in told and "Traceback" not in said, said
        kinds[found[0]] += 1
        for file in out.rglob("*.pth"):
            assert what_damages(file) == ""
        assert not list(out.rglob("*.part"))
        result = out / "result.json"
        assert not result.exists() or read_json(result) is not None
        stops += 1
        kib += max(size // 2, 64)
        assert kib < 4 * needed
    assert stops > 3
    assert tiny.same(out)
    record_property("tried", f"{stops} full disks, then room: resumed to the same end; {kinds}")
    assert os.path.ismount(disk)
