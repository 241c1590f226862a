"""Files of other people: what is plain data is read, and nothing else is run."""

import io
import os
import pickle
import re
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd_det.checkpoint import KDCheckpointer
from kd_det.distillation.teacher import load_strictly
from kd_det.reading import RefusedFileError, load_checkpoint, load_pickle

CODE = "open({canary!r}, 'w').close()"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _raw(module: str, name: str, *words: str) -> bytes:
    """A pickle of protocol 0 that calls a function by name, which need not exist here."""
    arguments = b"".join(f"V{word}\n".encode() for word in words)
    return f"c{module}\n{name}\n(".encode() + arguments + b"tR."


def _state(canary: str) -> bytes:
    """An array whose state is set to a call."""
    array = np.zeros(2)
    function, arguments, _ = array.__reduce__()
    return pickle.dumps(Build(function, arguments, Call(exec, CODE.format(canary=canary))))


class Build:
    """Pickles as a call, and a state set on its result."""

    def __init__(self, function: Any, arguments: Any, state: Any) -> None:
        self._parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._parts


def hostile_pickles(canary: str) -> dict[str, bytes]:
    """Pickles that would write the file `canary`, by a short name of how."""
    code = CODE.format(canary=canary)
    touch = f"touch {canary}"
    calls = {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, canary, "w"),
        "inside a dict": {"model": {"w": np.ones(2), "x": Call(exec, code)}, "__author__": "x"},
        "as a key": {Call(exec, code): 1},
        "in an array of objects": np.array([Call(exec, code)], dtype=object),
        "in an OrderedDict": OrderedDict(a=Call(exec, code)),
        "as author": {"model": {}, "__author__": Call(exec, code)},
        "torch's old loader": Call(torch.storage._load_from_bytes, _torch_bytes(code)),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "map": Call(list, Call(map, exec, [code])),
        "compile": Call(compile, code, "x", "exec"),
        "a file of numpy": Call(np.save, canary, np.ones(1)),
        "a memory map of numpy": Call(np.memmap, canary, "u1", "w+", 0, (8,)),
        "a file of torch": Call(torch.save, 1, canary),
    }
    out = {f"{k}, protocol {p}": pickle.dumps(v, p) for k, v in calls.items() for p in (0, 2, 4)}
    python2 = {
        "posix.system": _raw("posix", "system", touch),
        "__builtin__.eval": _raw("__builtin__", "eval", code),
        "__builtin__.execfile": _raw("__builtin__", "execfile", canary),
        "commands.getoutput": _raw("commands", "getoutput", touch),
        "subprocess.getoutput": _raw("subprocess", "getoutput", touch),
        "pty.spawn": _raw("pty", "spawn", touch),
        "runpy": _raw("runpy", "run_path", canary),
        "numpy's own eval": _raw("numpy.testing._private.utils", "runstring", code, "{}"),
        "numpy's exec": _raw("numpy.f2py.crackfortran", "myeval", code),
        "a module that is not there": _raw("evil_module_of_no_one", "run"),
        "a dotted name": pickle.dumps(Call(exec, code), 4).replace(b"exec", b"eval"),
        "a module beside numpy": _raw("numpy.core.multiarray.os", "system", touch),
        "another codec": _raw("_codecs", "encode", "x", "idna"),
        "torch's hub": _raw("torch.hub", "load", "a/b", "c"),
        "joblib": _raw("joblib", "load", canary),
        "state of an array": _state(canary),
    }
    return {**out, **python2}


def _torch_bytes(code: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(exec, code), buffer)
    return buffer.getvalue()


KINDS = list(hostile_pickles("canary"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class TestPickle:
    @pytest.mark.parametrize("kind", KINDS)
    def test_hostile_ones_are_refused_and_not_run(
        self, tmp_path: Path, canary: Path, kind: str
    ) -> None:
        path = tmp_path / "weights.pkl"
        path.write_bytes(hostile_pickles(str(canary))[kind])
        with pytest.raises(ValueError, match=r"weights.pkl") as error:
            load_pickle(path)
        assert not canary.exists()
        assert "docs/reliability.md" in str(error.value) or "codec" in kind

    def test_the_message_names_file_and_function(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pkl"
        path.write_bytes(pickle.dumps({"model": Call(os.system, "true")}))
        with pytest.raises(RefusedFileError, match=r"weights.pkl asks for (posix|nt).system; a "):
            load_pickle(path)

    def test_the_corpus_is_hostile(self, canary: Path) -> None:
        """Python's own unpickler runs it: the canary appears."""
        pickle.loads(hostile_pickles(str(canary))["inside a dict, protocol 2"])
        assert canary.exists()

    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_data_is_read(self, tmp_path: Path, protocol: int) -> None:
        array = np.arange(6, dtype="f4").reshape(2, 3)
        content = {
            "model": OrderedDict(w=array, b=np.float64(2), f=np.asfortranarray(array)),
            "other": [1, 2.5, "ä", b"\x00\xff", b"", None, True, (1,), {2}, frozenset({3}), 2**70],
            "strings": np.array(["ab", "c"]),
        }
        path = tmp_path / "weights.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        found = load_pickle(path)
        np.testing.assert_array_equal(found["model"]["w"], array)
        np.testing.assert_array_equal(found["model"]["f"], array)
        assert found["model"]["b"] == 2
        assert found["other"] == content["other"]
        assert list(found["strings"]) == ["ab", "c"]

    @pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
    def test_what_another_numpy_wrote(self, tmp_path: Path, module: bytes) -> None:
        written = pickle.dumps({"w": np.ones(3)}, 2)
        here = np.core.__name__.encode() if not hasattr(np, "_core") else b"numpy._core"
        path = tmp_path / "weights.pkl"
        path.write_bytes(written.replace(b"c" + here + b".", b"c" + module + b"."))
        np.testing.assert_array_equal(load_pickle(path)["w"], np.ones(3))

    def test_what_python_2_wrote(self, tmp_path: Path) -> None:
        """Its strings hold bytes: latin1 gives them back, for arrays as for names."""
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        )
        raw = np.array([1, -3e38], dtype="<f4").tobytes()
        assert max(raw) > 127
        path = tmp_path / "weights.pkl"
        path.write_bytes(b"\x80\x02}U\x01w" + array + raw + b"tbs.")
        assert load_pickle(path)["w"].tobytes() == raw

    @pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"\x80\x04]", b"]]]a."])
    def test_damaged_ones_name_the_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "weights.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.pkl (is not a whole pickle|holds)"):
            load_checkpoint(path)

    def test_a_checkpoint_of_torch_without_its_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pkl"
        path.write_bytes(b"\x80\x02X\x01\x00\x00\x00aQ.")
        with pytest.raises(RefusedFileError, match=r"weights.pkl refers to .* the ending .pth"):
            load_pickle(path)


class TestCheckpoint:
    @pytest.fixture
    def save(self, tmp_path: Path) -> Callable[..., Path]:
        def write(content: Any, name: str = "weights.pth", **options: Any) -> Path:
            torch.save(content, tmp_path / name, **options)
            return tmp_path / name

        return write

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("ending", ["pth", "pyth", "pt", ""])
    @pytest.mark.parametrize("function", [exec, eval])
    def test_hostile_ones_are_refused_and_not_run(
        self, save: Any, canary: Path, zipped: bool, ending: str, function: Any
    ) -> None:
        call = Call(function, CODE.format(canary=str(canary)))
        content = {"model": {"w": torch.ones(1)}, "model_state": {}, "x": call}
        path = save(content, f"weights.{ending}", _use_new_zipfile_serialization=zipped)
        torch.load(path, weights_only=False)
        assert canary.exists()
        canary.unlink()
        with pytest.raises(RefusedFileError, match=r"weights.*\b(exec|eval)\b") as error:
            load_checkpoint(path)
        assert not canary.exists()
        assert "docs/reliability.md" in str(error.value)

    def test_weights_only_is_asked_for_and_not_left_to_a_default(
        self, save: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before torch 2.6 the default executes."""
        asked: list[Any] = []
        original = torch.load

        def load(*args: Any, weights_only: Any = None, **kwargs: Any) -> Any:
            asked.append(weights_only)
            return original(*args, weights_only=weights_only, **kwargs)

        path = save({"model": {"w": torch.ones(1)}, "model_state": {"w": torch.ones(1)}})
        monkeypatch.setattr(torch, "load", load)
        load_checkpoint(path)
        load_checkpoint(path.rename(path.with_suffix(".pyth")))
        assert asked == [True, True]

    def test_a_torchscript_program(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "weights.pth"))
        with pytest.raises(RefusedFileError, match=r"weights.pth is a TorchScript program"):
            load_checkpoint(tmp_path / "weights.pth")

    @pytest.mark.parametrize("tail", [b"", b"PK\x05\x06" + bytes(18)])
    def test_a_tar_archive(self, tmp_path: Path, tail: bytes) -> None:
        """Also one that ends like a zip, which is a zip for Python and a tar for torch."""
        path = tmp_path / "weights.pth"
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        path.write_bytes(path.read_bytes() + tail)
        with pytest.raises(RefusedFileError, match=r"weights.pth is a tar archive"):
            load_checkpoint(path)

    def test_the_shapes_that_detectron2_reads(self, tmp_path: Path, save: Any) -> None:
        def write(content: Any) -> Path:
            (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, 2))
            return tmp_path / "zoo.pkl"

        w = [1.0]  # lists compare as a whole
        zoo = {"model": {"w": w}, "__author__": "Someone", "matching_heuristics": True}
        assert load_checkpoint(write(zoo)) == zoo
        caffe2 = {"model": {"w": w}, "__author__": "Caffe2", "matching_heuristics": True}
        assert load_checkpoint(write({"blobs": {"w": w, "w_momentum": w}, "cfg": "x"})) == caffe2
        assert load_checkpoint(write({"w": w, "w_momentum": w})) == caffe2
        tensor = torch.ones(1)
        assert load_checkpoint(save({"w": tensor})) == {"model": {"w": tensor}}
        state = {"w": tensor, "bn.num_batches_tracked": tensor}
        pycls = {"model": {"w": tensor}, "__author__": "pycls", "matching_heuristics": True}
        assert load_checkpoint(save({"model_state": state}, "a.pyth")) == pycls

    @pytest.mark.parametrize("content", [[1], torch.ones(1), "text"])
    def test_a_file_without_names(self, save: Any, content: Any) -> None:
        with pytest.raises(ValueError, match=r"weights.pth holds \w+, expected a mapping"):
            load_checkpoint(save(content))

    @pytest.mark.parametrize("content", [{"blobs": [1]}, {1: 2}, {"blobs": {1: 2}}])
    def test_a_pickle_without_names(self, tmp_path: Path, content: Any) -> None:
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"zoo.pkl holds no mapping of names"):
            load_checkpoint(tmp_path / "zoo.pkl")

    def test_a_pycls_file_without_its_part(self, save: Any) -> None:
        with pytest.raises(ValueError, match=r"a.pyth has no 'model_state'"):
            load_checkpoint(save({}, "a.pyth"))


class TestRoles:
    """A hostile file in each place that a config, or a folder, can name."""

    @pytest.fixture
    def pkl(self, tmp_path: Path, canary: Path) -> Path:
        path = tmp_path / "model_final.pkl"
        content = {"model": Call(exec, CODE.format(canary=str(canary))), "__author__": "x"}
        path.write_bytes(pickle.dumps(content))
        return path

    def test_as_weights(self, tmp_path: Path, pkl: Path, canary: Path) -> None:
        checkpointer = KDCheckpointer(nn.Linear(1, 1), str(tmp_path))
        with pytest.raises(ValueError, match=r"MODEL.WEIGHTS: .*asks for builtins.exec"):
            checkpointer.load_student(str(pkl), strict=True)
        assert not canary.exists()

    def test_as_last_checkpoint(self, tmp_path: Path, pkl: Path, canary: Path) -> None:
        (tmp_path / "last_checkpoint").write_text(pkl.name)
        checkpointer = KDCheckpointer(nn.Linear(1, 1), str(tmp_path))
        with pytest.raises(ValueError, match=r"asks for builtins.exec"):
            checkpointer.load_student(checkpointer.get_checkpoint_file(), strict=True)
        assert not canary.exists()

    def test_as_teacher(self, pkl: Path, canary: Path) -> None:
        with pytest.raises(ValueError, match=r"The teacher's weights .*asks for builtins.exec"):
            load_strictly(nn.Linear(1, 1), str(pkl))
        assert not canary.exists()

    def test_as_checkpoint_to_resume(self, tmp_path: Path, canary: Path) -> None:
        call = Call(exec, CODE.format(canary=str(canary)))
        torch.save({"model": call}, tmp_path / "model_0000001.pth")
        with pytest.raises(RuntimeError, match=r"None of the checkpoints"):
            KDCheckpointer(nn.Linear(1, 1), str(tmp_path)).resume()
        assert not canary.exists()

    def test_benign_weights_of_the_zoo_load(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 1)
        arrays = {"weight": np.full((1, 2), 3, "f4"), "bias": np.full(1, 4, "f4")}
        content = {"model": arrays, "__author__": "Someone", "matching_heuristics": True}
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, 2))
        load_strictly(model, str(tmp_path / "zoo.pkl"))
        assert model.weight.tolist() == [[3, 3]]
        assert model.bias.tolist() == [4]


@pytest.mark.parametrize("kind", ["pkl", "pth"])
def test_the_documented_conversion(tmp_path: Path, kind: str) -> None:
    """A refused file that holds no harm becomes one that is read."""
    page = Path(__file__).parents[1] / "docs" / "reliability.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
        code = code.replace(f'"/{folder}"', repr(str(tmp_path / folder)))
    source = tmp_path / "in" / f"weights.{kind}"
    content = {"model": {"w": np.ones(2)}, "__author__": "x", "cfg": Call(Path, "config.yaml")}
    if kind == "pkl":
        source.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, source)
    with pytest.raises(RefusedFileError, match=r"Convert a refused file"):
        load_checkpoint(source)
    exec(code, {})
    found = load_checkpoint(tmp_path / "out" / "weights.pth")
    assert found["model"]["w"].tolist() == [1, 1]
    assert found["__author__"] == "x"
