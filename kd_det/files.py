"""Files that are whole at any moment, their digests, and where generated data is kept."""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def cache_root() -> Path:
    """Return where generated data is kept now: `$KD_DET_CACHE`, by default `~/.cache/kd_det`."""
    return Path(os.environ.get("KD_DET_CACHE") or Path.home() / ".cache" / "kd_det")


def shipped_root() -> Path:
    """Return the folder of the configs that ship: inside a wheel's package, or a checkout's."""
    package = Path(__file__).parent
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def offer_shipped(path: str | os.PathLike[str]) -> str:
    """Return a sentence for a message where kd_det ships the config that is missing; else ""."""
    root, parts = shipped_root(), Path(path).parts
    if "configs" not in parts:
        return ""
    tail = parts[len(parts) - 1 - parts[::-1].index("configs") :]
    if not root.joinpath(*tail).is_file():
        return ""
    return f" kd_det ships {'/'.join(tail)}: `kd-det configs` copies the configs here."


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    *,
    shared: bool = False,
    durable: bool = True,
) -> None:
    """
    Write a file in one go: readers see the old one or the new one, never a half.

    The content goes to `<path>.part`, which takes the file's place when it is on the disk, and is
    removed if that fails.

    Args:
        path: file to write; its folder must exist.
        write: writes the content into the open file it is given.
        shared: several processes may write this file at once, so each gets a draft of its own.
        durable: it must outlive a loss of power; False for what is written anew every second.

    Raises:
        OSError: the disk is full, or whatever else keeps the file from being written; the message
            names the file and the bytes.
    """
    target = Path(path)
    mark = f".{uuid.uuid4().hex}" if shared else ""
    draft = target.with_name(f"{target.name}{mark}.part")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException as error:
        cause = _os_error(error)
        told = _explained(cause, target, draft) if cause and draft.exists() else None
        draft.unlink(missing_ok=True)
        if told is None:
            raise
        raise told from error
    if durable:
        _sync_folder(target.parent)


def _explained(error: OSError, target: Path, draft: Path) -> OSError:
    """Return the system's error with the file and the bytes in its message."""
    free = shutil.disk_usage(target.parent).free
    message = (
        f"{target} could not be written ({error.strerror or error}): {draft.stat().st_size} bytes "
        f"were, and {free} bytes are free there. Make room, or choose another folder"
    )
    return OSError(message) if error.errno is None else OSError(error.errno, message)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system's error in a chain: torch raises one of its own about a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Make a renaming outlive a loss of power, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems sync no folders; the file itself is on the disk
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str, *, shared: bool = False) -> None:
    """Write a text file in one go; see `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()), shared=shared)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file; None where there is no such file, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(
    path: Path, content: Mapping[str, Any], *, shared: bool = False, durable: bool = True
) -> None:
    """
    Write a JSON file in one go, see `write_whole`, and its folder if need be.

    NaN and infinity (the AP of a size range without objects) become null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()), shared=shared, durable=durable)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
