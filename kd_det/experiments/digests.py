"""
What was found out about large files, kept so that unchanged ones are not read again.

It lies in `digests.json` under the cache root, by path, with size, time of the last change and time
of the last status change. The file is replaced as a whole, so several processes may use it at once:
what one of them loses to another is read again. Whatever cannot be read there is not used.
"""

import functools
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from kd_det.files import cache_root, read_json, sha256_of, write_json
from kd_det.reading import check_sums

Stamp = tuple[int, int, int]
# A file that changes twice within a tick of the clock keeps its time: what is this new is not kept.
_SETTLED_NS = 2 * 10**9
# Of about 200 bytes each; the oldest give way.
_MOST_ENTRIES = 4096


def digest_of(path: str | os.PathLike[str]) -> str:
    """
    Return the sha256 of a file, in hex.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    return _remembered("sha256", os.path.abspath(path), _stamp(path))


def checkpoint_damage(path: str | os.PathLike[str]) -> str:
    """Return what is wrong with a checkpoint of kd_det, for humans; "" if nothing is."""
    try:
        return _remembered("damage", os.path.abspath(path), _stamp(path))
    except OSError:
        return "missing"


def _sum_damage(path: str) -> str:
    if not zipfile.is_zipfile(path):
        return "no whole archive"
    try:
        check_sums(path)
    except ValueError:
        return "a checksum does not fit"
    return ""


_READERS: dict[str, Callable[[str], str]] = {"sha256": sha256_of, "damage": _sum_damage}


@functools.lru_cache(maxsize=1024)
def _remembered(kind: str, path: str, stamp: Stamp) -> str:
    """Return what a reader says of a file, from the cache if that knows the file as it is now."""
    key = f"{kind} {path}"
    found = _entries().get(key)
    if found and found[:-1] == [*stamp]:
        return str(found[-1])
    value = _READERS[kind](path)
    if _stamp(path) == stamp and max(stamp[1:]) < time.time_ns() - _SETTLED_NS:
        _keep(key, [*stamp, value])
    return value


def _entries() -> dict[str, list[int | str]]:
    try:
        content = read_json(_file()) or {}
    except OSError:
        return {}
    return {key: entry for key, entry in content.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    kinds = [int, int, int, str]
    return isinstance(entry, list) and [type(value) for value in entry] == kinds


def _keep(key: str, entry: list[int | str]) -> None:
    entries = _entries()
    entries.pop(key, None)  # the newest stands last
    entries[key] = entry
    kept = dict(list(entries.items())[-_MOST_ENTRIES:])
    try:
        write_json(_file(), kept, shared=True, durable=False)
    except OSError:
        pass  # no place for a cache: the next one reads the file again


def _file() -> Path:
    return cache_root() / "digests.json"


def _stamp(path: str | os.PathLike[str]) -> Stamp:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
