"""
What an installed Detectron2, Pillow or torch lacks, repaired in one place.

Call `install()` before anything of detectron2 is imported. Each repair tests for the thing that is
missing, never for a version, so the same file serves Detectron2 0.6 without its C++ extension and
upstream's main branch, compiled or not.
"""

import contextlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_WITHOUT_C = (
    "deformable convolution, rotated boxes and the C++ COCOeval need Detectron2's compiled "
    "extension, which this installation does not have; install Detectron2 from source with a "
    "compiler, or leave them out"
)


# The archive's metadata is not used: it pins old tools, and names a URL, which pip >= 26.3 refuses.
_INSTALL = (
    'uv pip install "setuptools>=77,<80" wheel "omegaconf>=2.1,<2.4" "iopath<0.1.10" '
    '"hydra-core>=1.1" cloudpickle && uv pip install --no-build-isolation --no-deps '
    "-C=--global-option=build_py -C=--build-option=--skip-build pb1-detectron2==0.6"
)

# Names that numpy removed. In 1.24 (bool is back since 2.0): Detectron2 0.6 has them in its masks,
# in its evaluators of Pascal VOC and semantic segmentation and in its reader of Pascal VOC, lvis
# 0.5 in its evaluator. In 2.4: cityscapesscripts 2.3 has in1d, and gives the result a shape itself.
_NUMPY_NAMES = {"bool": np.bool_, "int": int, "float": float, "str": str, "in1d": np.isin}


class _MissingExtension(types.ModuleType):
    """Stands in for `detectron2._C`; a use of it raises an error that says what is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"detectron2._C.{name} was called, but {_WITHOUT_C}.")

    # Detectron2's environment report asks for these.
    @staticmethod
    def get_compiler_version() -> str:
        """Say that nothing was compiled."""
        return "none: the C++ extension is not installed"

    get_cuda_version = get_compiler_version

    @staticmethod
    def has_cuda() -> bool:
        """Say that nothing was compiled for a GPU."""
        return False


def has_compiled_extension() -> bool:
    """Return whether Detectron2's C++ extension is really there."""
    if "detectron2._C" in sys.modules:
        return not isinstance(sys.modules["detectron2._C"], _MissingExtension)
    return importlib.util.find_spec("detectron2._C") is not None


def install() -> None:
    """
    Repair what is missing, in this process. Safe to call again.

    Raises:
        ImportError: no Detectron2 is installed at all; the message says how to get one.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "kd_det needs Detectron2, and none is installed. Either install it from its repository "
            "(see its INSTALL.md), or run `uv sync` in kd_det's folder, which adds the Python "
            "files of Detectron2 0.6 from the package index. Without that folder, `uv pip install` "
            f"gets them too:\n{_INSTALL}"
        )
    # Detectron2 scripts a few functions at import; nothing a user of kd_det could change.
    warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
    # Its anchor generators call it without `indexing`, which stays what it was.
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    from PIL import Image

    if not hasattr(Image, "LINEAR"):
        # Removed in Pillow 10; detectron2.data.transforms reads it at import.
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    for name, meaning in _NUMPY_NAMES.items():
        if name not in vars(np):  # `hasattr` would warn
            setattr(np, name, meaning)
    _stand_in_for_extension()
    if isinstance(sys.modules.get("detectron2._C"), _MissingExtension):
        _evaluate_without_extension()
    _settle_focal_loss()


def _stand_in_for_extension() -> None:
    """
    Stand in for the C++ extension where Detectron2 cannot be imported without it.

    `detectron2.layers` imports it unconditionally at v0.6. Later versions have a way around it,
    which a stand-in would block.
    """
    if "detectron2._C" in sys.modules or importlib.util.find_spec("detectron2._C") is not None:
        return
    try:
        importlib.import_module("detectron2.layers")
    except ImportError:
        sys.modules["detectron2._C"] = _MissingExtension("detectron2._C")


def _evaluate_without_extension() -> None:
    """Give Detectron2's own evaluator, which asks for the extension's COCO code, pycocotools'."""
    from detectron2.evaluation import coco_evaluation

    coco_evaluation.COCOeval_opt = coco_evaluation.COCOeval


def _settle_focal_loss() -> None:
    """
    Call the scripted focal loss of Detectron2's dense detectors once.

    TorchScript interprets the first call of a process and compiles the later ones, and the
    gradients differ in their last bit: a resumed run would not equal the uninterrupted one.
    """
    from fvcore.nn import sigmoid_focal_loss_jit

    logits = torch.zeros(1, 1, requires_grad=True)
    targets = torch.zeros(1, 1)
    sigmoid_focal_loss_jit(logits, targets, alpha=0.25, gamma=2.0, reduction="sum").backward()


def numpy_rebuilders() -> dict[str, Any]:
    """Return what a file with numpy arrays or scalars refers to, by full name; all plain data."""
    core: Any = getattr(np, "_core", None) or np.core
    out: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    # numpy moved the module in 2.0; a file written before names the old place.
    for package in ("numpy.core", "numpy._core"):
        out[f"{package}.multiarray._reconstruct"] = core.multiarray._reconstruct
        out[f"{package}.multiarray.scalar"] = core.multiarray.scalar
        out[f"{package}.numeric._frombuffer"] = core.numeric._frombuffer
    return out


class _Named:
    """A function under the name that files give it; torch 2.4 looks functions up by their own."""

    def __init__(self, function: Any, full_name: str) -> None:
        self._function = function
        self.__module__, self.__name__ = full_name.rsplit(".", 1)
        self.__qualname__ = self.__name__

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _numpy_globals() -> list[Any]:
    kinds = ("bool", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8")
    out: list[Any] = [type(np.dtype(kind)) for kind in kinds]
    for name, value in numpy_rebuilders().items():
        out.append(value if isinstance(value, type) else _Named(value, name))
    return out


@contextlib.contextmanager
def safe_numpy_load() -> Iterator[None]:
    """
    Let `torch.load(weights_only=True)` read numpy arrays, and nothing else, inside the context.

    Model-zoo files hold numpy arrays, which the safe unpickler refuses by default. The safety
    itself stays on, provided that `weights_only=True` is given: torch before 2.6 has another
    default.
    """
    serialization = torch.serialization
    before = list(serialization.get_safe_globals())
    serialization.add_safe_globals([*_numpy_globals()])
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)
