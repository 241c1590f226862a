"""
Checkpoints and pickles of other people, read without running what they may hold.

A pickle names the functions that build its objects. Here it may name those of numpy arrays and
plain containers; torch's own reader admits tensors beside them. Anything else is refused before it
is called, and the message names it.
"""

import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from kd_det.compat import numpy_rebuilders, safe_numpy_load

_CONVERT = (
    "If you know where the file is from, convert it to tensors in a place that holds nothing else: "
    'docs/reliability.md, "Convert a refused file", has the command'
)
_OTHER_COPY = "Take another copy of it, or the checkpoint before it."
_ENCODINGS = ("latin1", "latin-1")
_ZIP = b"PK\x03\x04"


class RefusedFileError(ValueError):
    """A file asks for something that only running its code would give."""


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """
    Read a pickle of numpy arrays, numbers, strings and plain containers.

    Args:
        path: local file, of Python 2 or 3 and of any numpy.

    Raises:
        RefusedFileError: it names another function or class; nothing of it was called.
        ValueError: it is no pickle, or not a whole one.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, os.fspath(path)).load()
        except RefusedFileError:
            raise
        except Exception as error:  # whatever a damaged pickle raises
            raise ValueError(
                f"{os.fspath(path)} is not a whole pickle ({type(error).__name__}: {error})"
            ) from error


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """
    Read a file of `torch.save` that holds tensors, numpy arrays and plain containers, on the CPU.

    Raises:
        RefusedFileError: it holds other objects, a TorchScript program, or is a tar archive, which
            torch before 2.6 unpacks whatever is in it (CVE-2025-32434).
        ValueError: a part of it does not fit its checksum.
        Exception: whatever torch raises for a damaged file.
    """
    name = os.fspath(path)
    _refuse_archives(name)
    check_sums(name)
    try:
        with safe_numpy_load():
            return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedFileError(
            f"{name} is no file of tensors and numpy arrays alone: {_reason(error)}. Nothing in it "
            f"was run. {_CONVERT}."
        ) from error


def what_damages(path: str | os.PathLike[str]) -> str:
    """
    Return why a file of `torch.save` cannot be read, in one line; "" where it can.

    Raises:
        RefusedFileError: it is whole, and holds what is refused: somebody's file, no damage.
        OSError: the file is absent, or the disk does not give it out.
    """
    try:
        load_tensors(path)
    except OSError:
        raise
    except Exception as error:  # whatever torch raises for a damaged file
        if isinstance(error, RefusedFileError) and zipfile.is_zipfile(path):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def check_sums(path: str | os.PathLike[str]) -> None:
    """
    Compare the parts of a zip archive with their checksums, which torch does not look at.

    Raises:
        ValueError: a part does not fit. Files that are no zip archives have no checksums.
    """
    name = os.fspath(path)
    if not zipfile.is_zipfile(name):
        return
    try:
        with zipfile.ZipFile(name) as archive:
            part = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # whatever damaged headers raise: of encryption, of unknown methods
        problem = f"its archive cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"{name} is damaged: {problem}. {_OTHER_COPY}") from error
    if part is not None:
        problem = f"{part} does not fit its checksum"
        raise ValueError(f"{name} is damaged: {problem}. {_OTHER_COPY}")


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read weights of Detectron2, its model zoo, Caffe2 or pycls, as Detectron2's checkpointer does.

    Args:
        path: local file; ".pkl" is a pickle of arrays, ".pyth" a checkpoint of pycls, anything
            else one of torch.

    Returns:
        A mapping with "model", and "matching_heuristics" where names are another project's.

    Raises:
        RefusedFileError: it holds anything but tensors, arrays and plain containers.
        ValueError: it is damaged or holds no mapping of names to tensors.
    """
    name = os.fspath(path)
    content = load_pickle(name) if name.endswith(".pkl") else load_tensors(name)
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {type(content).__name__}, expected a mapping of tensors")
    if name.endswith(".pyth"):
        return _of_pycls(content, name)
    if name.endswith(".pkl") and not {"model", "__author__"} <= content.keys():
        return _of_caffe2(content, name)
    return content if "model" in content else {"model": content}


def _of_caffe2(content: dict[str, Any], name: str) -> dict[str, Any]:
    blobs = content.get("blobs", content)
    if not isinstance(blobs, dict) or not all(isinstance(key, str) for key in blobs):
        raise ValueError(f"{name} holds no mapping of names to arrays")
    weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _of_pycls(content: dict[str, Any], name: str) -> dict[str, Any]:
    state = content.get("model_state")
    if not isinstance(state, dict):
        raise ValueError(f"{name} has no 'model_state', which a checkpoint of pycls (.pyth) has")
    weights = {key: value for key, value in state.items() if not key.endswith("batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _refuse_archives(name: str) -> None:
    """Refuse what torch reads by other ways than its safe unpickler; it looks in this order."""
    with open(name, "rb") as file:
        start = file.read(len(_ZIP))
    if start == _ZIP:
        # By torch's own reader: another one may see another list in a manipulated archive.
        if "constants.pkl" in torch._C.PyTorchFileReader(name).get_all_records():
            raise RefusedFileError(
                f"{name} is a TorchScript program, expected a checkpoint: save the state_dict of "
                "the model it was made from"
            )
    elif tarfile.is_tarfile(name):
        raise RefusedFileError(
            f"{name} is a tar archive, as torch before 0.4 wrote, no checkpoint. {_CONVERT}."
        )


def _reason(error: Exception) -> str:
    """Return the sentence of torch's message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (named or lines or [type(error).__name__])[0].rstrip(".")


class _PlainUnpickler(pickle.Unpickler):
    """Python's unpickler, which finds nothing but what builds arrays and plain containers."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        # Python 2 wrote arrays as strings; latin1 gives back their bytes.
        super().__init__(file, encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        """Return what builds an array or a container; refuse the rest without importing it."""
        found = numpy_rebuilders().get(f"{module}.{name}") or _containers().get((module, name))
        if found is None:
            raise RefusedFileError(
                f"{self._name} asks for {module}.{name}; a pickle may hold numpy arrays, numbers, "
                f"strings, lists, tuples, dicts and sets only. Nothing in it was run. {_CONVERT}."
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to what is outside the file."""
        raise RefusedFileError(
            f"{self._name} refers to an object outside of it ({pid!r:.80}), as a checkpoint of "
            "torch does; give such a file the ending .pth"
        )


def _containers() -> dict[tuple[str, str], Callable[..., Any]]:
    # Made anew each time, since a pickle can set attributes of what it is given.
    def encode(text: str, encoding: str) -> bytes:
        if encoding not in _ENCODINGS:
            raise ValueError(f"bytes are written as {encoding!r:.40}, expected 'latin1'")
        return text.encode("latin1")

    out: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        # Protocols below 3 have no bytes of their own.
        ("_codecs", "encode"): encode,
    }
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset):
            out[module, kind.__name__] = kind
        out[module, "bytes"] = lambda: b""
    return out
