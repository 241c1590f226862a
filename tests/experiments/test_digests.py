"""Digests of files are remembered on the disk, and never those of a file that has changed."""

import json
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_det.experiments import digests
from kd_det.experiments.digests import checkpoint_damage, digest_of
from kd_det.files import sha256_of

Read = list[str]


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The names of the files that were read, with an empty cache."""
    monkeypatch.setenv("KD_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    names: Read = []

    def reader(path: str) -> str:
        names.append(Path(path).name)
        return sha256_of(path)

    monkeypatch.setitem(digests._READERS, "sha256", reader)
    digests._remembered.cache_clear()
    return names


def again(path: Path) -> str:
    """Ask as another process would."""
    digests._remembered.cache_clear()
    return digest_of(path)


def test_an_unchanged_file_is_read_once_by_all_processes(reads: Read, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("one")
    assert {digest_of(file), again(file), again(file)} == {sha256_of(file)}
    assert reads == ["a.json"]
    assert (tmp_path / "cache" / "digests.json").is_file()


def rewrite(file: Path) -> None:
    file.write_text("two")  # as long as before


def replace(file: Path) -> None:
    """By a file of the same size and time, as `cp -p` and `rsync -t` leave them."""
    times = file.stat()
    other = file.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)


def lengthen(file: Path) -> None:
    times = file.stat()
    file.write_text("one more")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, replace, lengthen])
def test_a_changed_file_is_read_again(
    reads: Read, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "a.json"
    file.write_text("one")
    digest_of(file)
    os.utime(file, ns=(0, 10**18))
    before = again(file)
    change(file)
    assert again(file) == sha256_of(file) != before
    assert len(reads) == 3


def test_a_file_of_this_moment_is_not_remembered(
    reads: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change once more within the same tick of the clock."""
    monkeypatch.setattr(digests, "_SETTLED_NS", 60 * 10**9)
    file = tmp_path / "a.json"
    file.write_text("one")
    digest_of(file), again(file)
    assert reads == ["a.json"] * 2


CORRUPTED = [
    *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, None),
    *(b'{"sha256 FILE": 3}', b'{"sha256 FILE": [1, 2]}'),
    *(b'{"sha256 FILE": [3, "a", 1, "x"]}', b'{"sha256 FILE": [3, 1e3, true, "x"]}'),
]


@pytest.mark.parametrize("content", CORRUPTED)
def test_a_corrupted_cache_is_not_used_and_mended(
    reads: Read, tmp_path: Path, content: bytes | None
) -> None:
    file, cache = tmp_path / "a.json", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    digest_of(file)
    cache.unlink()
    if content is not None:
        cache.write_bytes(content.replace(b"FILE", str(file).encode()))
    assert again(file) == sha256_of(file)
    assert len(reads) == 2
    assert again(file) == sha256_of(file)
    assert len(reads) == 2


def test_without_a_place_for_the_cache_files_are_read(
    reads: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("one")
    monkeypatch.setenv("KD_DET_CACHE", str(file / "below"))
    assert digest_of(file) == again(file) == sha256_of(file)
    assert len(reads) == 2


def test_many_at_once_leave_a_whole_cache(reads: Read, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.json" for i in range(8)]
    for file in files:
        file.write_text(file.name)
    wrong: list[Path] = []

    def work() -> None:
        for _ in range(5):
            wrong.extend(file for file in files if again(file) != sha256_of(file))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path / "cache") == ["digests.json"]
    known = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert 0 < len(known) <= len(files)


def test_the_oldest_entries_give_way(
    reads: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_MOST_ENTRIES", 2)
    for name in "abac":
        (tmp_path / name).write_text(name)
        again(tmp_path / name)
    known = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert [Path(key).name for key in known] == ["a", "c"]


def test_damage_of_checkpoints(reads: Read, tmp_path: Path) -> None:
    file = tmp_path / "model_final.pth"
    assert checkpoint_damage(file) == "missing"
    file.write_bytes(b"PK\x03\x04")
    assert checkpoint_damage(file) == "no whole archive"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", "weights")
    assert checkpoint_damage(file) == ""
    assert digest_of(file) == sha256_of(file)  # each has an entry of its own
    file.write_bytes(file.read_bytes().replace(b"weights", b"weighte"))
    assert checkpoint_damage(file) == "a checksum does not fit"
