"""Files that are whole or not there, digests, and the cache's place."""

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from kd_det.files import cache_root, read_json, sha256_of, write_json, write_text, write_whole


@pytest.fixture
def small_disk() -> Iterator[int]:
    """The system refuses to let files grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_json_files_hold_null_for_nan_and_half_files_are_none(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert read_json(tmp_path / "deep" / "a.json") == {"a": [None, 1.5], "b": {"c": None}}
    (tmp_path / "half.json").write_text('{"a": ')
    assert read_json(tmp_path / "half.json") is None
    assert read_json(tmp_path / "absent.json") is None


@pytest.mark.parametrize("shared", [False, True])
def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        assert len(list(tmp_path.glob("a.txt*.part"))) == 1

    write_whole(path, write, shared=shared)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_file_and_its_renaming_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []

    def sync(handle: int) -> None:
        whole = (tmp_path / "a.json").exists()
        synced.append((os.path.samestat(os.fstat(handle), os.stat(tmp_path)), whole))

    monkeypatch.setattr(os, "fsync", sync)
    write_json(tmp_path / "a.json", {})
    assert synced == [(False, False), (True, True)]  # the draft, then the folder with its new name
    write_json(tmp_path / "a.json", {}, durable=False)
    assert len(synced) == 2


def test_two_processes_may_write_a_shared_file_at_once(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"first")
        write_text(tmp_path / "a", "second", shared=True)  # begins later, ends earlier

    write_whole(tmp_path / "a", write, shared=True)
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, small_disk: int) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    message = rf"{path} could not be written \(File too large\): {small_disk} bytes were, and \d+ "
    with pytest.raises(OSError, match=message) as error:
        write_json(path, {"a": "x" * 2 * small_disk})
    assert error.value.errno is not None
    # torch's own writer hides the system's error behind one of its own.
    for size in (small_disk // 4, small_disk):
        with pytest.raises(OSError, match=message):
            write_whole(path, lambda file, n=size: torch.save(torch.zeros(n), file))
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    def interrupt(file: BinaryIO) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", interrupt)
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", lambda file: file.write("text"))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_digest_of_a_file_longer_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_the_variable_says_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_DET_CACHE", "/somewhere")
    assert cache_root() == Path("/somewhere")
    monkeypatch.setenv("KD_DET_CACHE", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/kd_det")
