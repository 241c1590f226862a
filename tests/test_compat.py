"""Repairs of what an installed Detectron2, Pillow or torch lacks."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_det import compat

STUBBED = isinstance(sys.modules.get("detectron2._C"), compat._MissingExtension)


@pytest.fixture
def stub() -> compat._MissingExtension:
    return compat._MissingExtension("detectron2._C")


def test_the_missing_extension_says_what_is_missing(stub: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"detectron2._C.deform_conv_forward was called"
    ) as error:
        stub.deform_conv_forward(1, 2)
    assert "does not have; install Detectron2 from source" in str(error.value)


def test_the_missing_extension_looks_like_a_module(stub: Any) -> None:
    """Tools that walk `sys.modules` ask for dunder names and expect AttributeError."""
    assert not hasattr(stub, "__file__")
    assert stub.__name__ == "detectron2._C"


def test_the_missing_extension_answers_the_environment_report(stub: Any) -> None:
    assert stub.has_cuda() is False
    assert "not installed" in stub.get_compiler_version()
    assert "not installed" in stub.get_cuda_version()


@pytest.mark.skipif(not STUBBED, reason="this Detectron2 needs no stand-in")
def test_detectron2s_environment_report_runs_without_the_extension() -> None:
    from detectron2.utils.collect_env import collect_env_info

    assert "the C++ extension is not installed" in collect_env_info()


@pytest.mark.skipif(not STUBBED, reason="this Detectron2 needs no stand-in")
def test_a_compiled_operator_stops_with_the_message_of_the_stub() -> None:
    from detectron2.layers import ROIAlignRotated

    align = ROIAlignRotated((1, 1), 1.0, 0)
    message = r"detectron2._C.roi_align_rotated_forward was called, but .*compiled extension"
    with pytest.raises(RuntimeError, match=message):
        align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))


def test_install_is_idempotent() -> None:
    import PIL.Image

    before = sys.modules.get("detectron2._C"), PIL.Image.LINEAR
    compat.install()
    compat.install()
    assert (sys.modules.get("detectron2._C"), PIL.Image.LINEAR) == before


def test_install_keeps_a_real_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)("detectron2._C")
    monkeypatch.setitem(sys.modules, "detectron2._C", real)
    compat.install()
    assert sys.modules["detectron2._C"] is real


def test_install_without_detectron2_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Detectron2, and none is installed.*uv sync"):
        compat.install()


def test_the_pil_alias_is_made_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.delattr(Image, "LINEAR", raising=False)
    compat.install()
    assert Image.LINEAR == Image.Resampling.BILINEAR
    monkeypatch.setattr(Image, "LINEAR", "the installed one's")
    compat.install()
    assert Image.LINEAR == "the installed one's"


@pytest.mark.parametrize("name", compat._NUMPY_NAMES)
def test_numpys_old_names_are_made_where_they_are_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if np.lib.NumpyVersion(np.__version__) < "1.24.0":
        pytest.skip("aliases that warn")
    monkeypatch.delattr(np, name, raising=False)
    compat.install()
    assert vars(np)[name] is compat._NUMPY_NAMES[name]
    monkeypatch.setattr(np, name, "the installed one's")
    compat.install()
    assert vars(np)[name] == "the installed one's"


def test_the_stub_is_made_only_where_detectron2_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions do without the extension, and know themselves what then is missing."""
    monkeypatch.delitem(sys.modules, "detectron2._C", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    compat._stand_in_for_extension()
    assert "detectron2._C" not in sys.modules

    def fails(name: str) -> None:
        raise ImportError("cannot import name '_C' from 'detectron2'")

    monkeypatch.setattr(importlib, "import_module", fails)
    compat._stand_in_for_extension()
    assert isinstance(sys.modules["detectron2._C"], compat._MissingExtension)


def test_a_host_may_have_taken_every_name() -> None:
    script = """
import sys, types
sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")  # only so that the host starts
from PIL import Image
Image.LINEAR = Image.Resampling.BILINEAR
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
ours = ["ATSS", "FCOS", "GFL", "AlignedMultiScaleDetector", "DistillationDetector"]
for name in ours:
    host = type(name, (), {"__module__": "host"})
    META_ARCH_REGISTRY._obj_map.setdefault(name, host)
BACKBONE_REGISTRY.register(type("build_timm_backbone", (), {"__module__": "host"}))
import kd_det
from kd_det.config.keys import add_kd_config
from detectron2.config import get_cfg
add_kd_config(get_cfg())
assert META_ARCH_REGISTRY.get("ATSS").__module__ == "host"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Arbitrary:
    """Stands for whatever code a manipulated file would run."""

    def __init__(self) -> None:
        self.value = 1


class TestSafeLoad:
    def save(self, folder: Path, content: Any) -> Path:
        torch.save(content, folder / "file.pth")
        return folder / "file.pth"

    @pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "bool"])
    def test_reads_numpy_arrays_and_scalars(self, tmp_path: Path, kind: str) -> None:
        array = np.arange(6).reshape(2, 3).astype(kind)
        content = {"model": {"w": array, "t": torch.ones(2)}, "iteration": array[1, 2]}
        path = self.save(tmp_path, content)
        with pytest.raises(Exception, match=r"[Ww]eights.?only"):
            torch.load(path, weights_only=True)
        with compat.safe_numpy_load():
            found = torch.load(path, weights_only=True)
        np.testing.assert_array_equal(found["model"]["w"], array)
        assert found["model"]["w"].dtype == array.dtype
        assert found["iteration"] == array[1, 2]

    @pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
    def test_reads_what_another_numpy_wrote(self, tmp_path: Path, module: bytes) -> None:
        """What numpy 1 called numpy.core, numpy 2 calls numpy._core."""
        path, array = tmp_path / "file.pth", np.ones(3, dtype="f4")
        torch.save({"w": array}, path, _use_new_zipfile_serialization=False)
        written = path.read_bytes()
        assert re.search(rb"cnumpy\._?core\.multiarray\n_reconstruct", written)
        path.write_bytes(re.sub(rb"cnumpy\._?core\.", b"c" + module + b".", written))
        with compat.safe_numpy_load():
            np.testing.assert_array_equal(torch.load(path, weights_only=True)["w"], array)

    def test_still_refuses_arbitrary_classes(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, {"model": Arbitrary()})
        with compat.safe_numpy_load(), pytest.raises(Exception, match=r"Arbitrary"):
            torch.load(path, weights_only=True)

    def test_still_refuses_arrays_of_objects(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, {"model": np.array([Arbitrary()], dtype=object)})
        with compat.safe_numpy_load(), pytest.raises(Exception, match=r"[Ww]eights.?only"):
            torch.load(path, weights_only=True)

    def test_the_permission_ends_with_the_context(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, {"w": np.ones(3)})
        with compat.safe_numpy_load():
            torch.load(path, weights_only=True)
        with pytest.raises(Exception, match=r"[Ww]eights.?only"):
            torch.load(path, weights_only=True)

    def test_leaves_other_permissions_as_they_were(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, {"model": Arbitrary()})
        with torch.serialization.safe_globals([Arbitrary]):
            with compat.safe_numpy_load():
                pass
            assert torch.load(path, weights_only=True)["model"].value == 1

    def test_needs_no_more_than_torch_2_4_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has no `safe_globals`, and looks a function up by its own module and name alone."""
        given: list[Any] = []
        add = torch.serialization.add_safe_globals
        monkeypatch.delattr(torch.serialization, "safe_globals")
        monkeypatch.setattr(
            torch.serialization, "add_safe_globals", lambda new: (given.extend(new), add(new))
        )
        path = self.save(tmp_path, {"w": np.ones(3)})
        with compat.safe_numpy_load():
            assert torch.load(path, weights_only=True)["w"].sum() == 3
        names = {f"{item.__module__}.{item.__name__}" for item in given}
        assert {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"} <= names


def test_users_do_not_see_a_warning_about_detectron2s_anchors() -> None:
    script = """
import inspect
import kd_det, torch
from detectron2.modeling.anchor_generator import _create_grid_offsets
late = "target_device_tensor" in inspect.signature(_create_grid_offsets).parameters
target = torch.zeros(1) if late else "cpu"
_create_grid_offsets([4, 4], 8, 0.5, target)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "meshgrid" not in done.stderr
