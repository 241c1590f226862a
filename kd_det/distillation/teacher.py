"""
The teacher: built from its own config, loaded strictly, frozen, invisible to training.

It is a plain object and not a module, so its tensors reach no optimizer, no checkpoint, no DDP
bucket and no `.train()`.
"""

import fnmatch
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from torch import nn

from kd_det.config import is_distillation, load_config, student_cfg
from kd_det.distillation.capture import Captures, FeatureCapture
from kd_det.distillation.classes import check_same_classes
from kd_det.distillation.ready_made import build_ready_made, digest_of, is_ready_made
from kd_det.distillation.views import View
from kd_det.files import sha256_of
from kd_det.reading import load_checkpoint
from kd_det.text import some

_logger = logging.getLogger(__name__)
_PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Buffers that old checkpoints carry and models make themselves.
_HARMLESS = ("pixel_mean", "pixel_std", "*anchor_generator.cell_anchors*", "*num_batches_tracked")


@dataclass(frozen=True)
class TeacherIdentity:
    """Which teacher it was: its config file, its weights' path and their sha256."""

    config_file: str
    weights: str
    sha256: str


class Teacher:
    """
    A frozen model that looks at the batch only as far as the captures need.

    Args:
        model: the detector; it is frozen and put into evaluation mode for good.
        view: what it sees of the loaded image.
        flip_channels: its pixel format has the other channel order than the loaded image.
        precision: "float32", "float16" or "bfloat16": autocast of its forward pass.
        identity: what is recorded in checkpoints.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        view: View | None = None,
        flip_channels: bool = False,
        precision: str = "float32",
        identity: TeacherIdentity | None = None,
    ) -> None:
        if precision not in _PRECISIONS:
            raise ValueError(
                f"KD.TEACHER.PRECISION is {precision!r}, expected one of {', '.join(_PRECISIONS)}."
            )
        self.model = model.eval().requires_grad_(False)
        self.view = view or View()
        self.flip_channels = flip_channels
        self.dtype = _PRECISIONS[precision]
        self.identity = identity
        self._cycles = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]

    @torch.no_grad()
    def __call__(
        self, batched_inputs: Sequence[dict[str, Any]], capture: FeatureCapture, stop_after: int
    ) -> Captures:
        """
        Run on the loaded batch until the last wanted capture has fired.

        Args:
            batched_inputs: the batch as loaded, in the student's pixel format.
            capture: what to keep.
            stop_after: number of captures after which the pass ends.
        """
        inputs = [{"image": self._image(item["image"])} for item in batched_inputs]
        with capture.record(stop_after) as captures, self.autocast():
            self.model(self.view(inputs))
        for norm in self._cycles:
            # It counts its calls to know the level; a pass that ended early leaves it in the
            # middle.
            norm._pos = 0
        return captures

    def autocast(self) -> torch.autocast:
        """Return the context with the arithmetic of the teacher's own forward pass."""
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def _image(self, image: torch.Tensor) -> torch.Tensor:
        # The model normalises by itself, with its own mean and std, after the channels are in
        # order.
        return image.flip(0) if self.flip_channels else image


def teacher_config(cfg: CfgNode) -> CfgNode:
    """
    Return the teacher's own full config.

    Raises:
        ValueError: KD.TEACHER.CONFIG_FILE is empty.
        FileNotFoundError: it does not exist.
    """
    if not cfg.KD.TEACHER.CONFIG_FILE:
        raise ValueError(
            "KD.TEACHER.CONFIG_FILE is empty, but distillers or KD.INHERIT need a teacher; name "
            "the yaml file the teacher was trained with."
        )
    try:
        out = load_config(cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.OPTS)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise type(error)(f"KD.TEACHER.CONFIG_FILE: {error.args[0]}") from error
    out.MODEL.DEVICE = cfg.MODEL.DEVICE
    return out


def teacher_weights(cfg: CfgNode, own_cfg: CfgNode) -> str:
    """Return the teacher's checkpoint; "auto" is the final one of its own OUTPUT_DIR."""
    weights = cfg.KD.TEACHER.WEIGHTS
    if weights == "auto":
        return os.path.join(own_cfg.OUTPUT_DIR, "model_final.pth")
    return str(weights)


def build_teacher(cfg: CfgNode, *, same_classes_as: nn.Module | None = None) -> Teacher:
    """
    Build, load and freeze the teacher that a student's config names.

    Args:
        cfg: the full config of the run.
        same_classes_as: the student, where a distiller reads class scores: both models' classes
            must agree.

    Raises:
        FileNotFoundError: no config file or no weights.
        ValueError: the weights are another model's, or the classes differ.
    """
    own_cfg = teacher_config(cfg)
    if is_ready_made(own_cfg):
        return _ready_made(cfg, own_cfg)
    weights = teacher_weights(cfg, own_cfg)
    if not weights or ("://" not in weights and not os.path.isfile(weights)):
        raise FileNotFoundError(
            f"The teacher's weights {weights!r} do not exist. Train it first (train_net.py "
            f"--config-file {cfg.KD.TEACHER.CONFIG_FILE}), or set KD.TEACHER.WEIGHTS to its "
            "checkpoint."
        )
    plain = student_cfg(own_cfg)
    flip = other_channel_order(cfg.INPUT.FORMAT, own_cfg.INPUT.FORMAT)
    # Every tensor comes from the checkpoint: nothing to download, no package to install.
    plain.MODEL.TIMM.PRETRAINED, plain.MODEL.TIMM.WEIGHTS = False, ""
    model = build_model(plain)
    if same_classes_as is not None:
        check_same_classes(same_classes_as, model, cfg, own_cfg)
    path = load_strictly(model, weights, ignore=cfg.KD.TEACHER.IGNORE_KEYS)
    # A teacher that was itself trained on a reduced view keeps looking at one.
    reduced = is_distillation(own_cfg)
    return Teacher(
        model,
        view=View(own_cfg.KD.STUDENT.VIEW_FACTOR, own_cfg.KD.STUDENT.VIEW_INTERPOLATION)
        if reduced
        else View(),
        flip_channels=flip,
        precision=cfg.KD.TEACHER.PRECISION,
        identity=TeacherIdentity(cfg.KD.TEACHER.CONFIG_FILE, weights, sha256_of(path)),
    )


def _ready_made(cfg: CfgNode, own_cfg: CfgNode) -> Teacher:
    """Build the teacher that needs no training; its tensors are its identity."""
    flip = other_channel_order(cfg.INPUT.FORMAT, own_cfg.INPUT.FORMAT)
    model = build_ready_made(student_cfg(own_cfg), cfg.KD.TEACHER.WEIGHTS)
    config_file, weights = cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS
    return Teacher(
        model,
        flip_channels=flip,
        precision=cfg.KD.TEACHER.PRECISION,
        identity=TeacherIdentity(config_file, weights, digest_of(model)),
    )


def other_channel_order(student: str, teacher: str) -> bool:
    """
    Return whether the teacher wants the loaded image's channels in reverse.

    Raises:
        ValueError: one pixel format cannot be had from the other.
    """
    if student == teacher:
        return False
    if {student, teacher} != {"RGB", "BGR"}:
        raise ValueError(
            f"The student's INPUT.FORMAT is {student!r}, the teacher's {teacher!r}; the teacher "
            "sees the image that was loaded for the student, so both must be equal, or one RGB and "
            "one BGR."
        )
    return True


class RecordingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which runs nothing it reads and keeps what did not match."""

    incompatible: Any = None

    def _load_file(self, filename: str) -> Any:
        return load_checkpoint(filename)

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def load_strictly(model: nn.Module, weights: str, *, ignore: Sequence[str] = ()) -> str:
    """
    Load weights of which every tensor must find its place, and every place its tensor.

    Args:
        model: the model; do not use it any further if this raises.
        weights: path or URL.
        ignore: fnmatch patterns of keys that may stay unmatched.

    Returns:
        The local path of the file.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message lists them.
    """
    checkpointer = RecordingCheckpointer(model, save_to_disk=False)
    path = checkpointer.path_manager.get_local_path(weights) if "://" in weights else weights
    try:
        checkpointer.load(path, checkpointables=[])
    except Exception as error:
        raise ValueError(
            f"The teacher's weights {weights} could not be read ({type(error).__name__}: {error})."
        ) from error

    def stray(keys: Iterable[str], patterns: Sequence[str] = (*_HARMLESS, *ignore)) -> list[str]:
        return [key for key in keys if not any(fnmatch.fnmatch(key, p) for p in patterns)]

    found = checkpointer.incompatible
    shapes = {key: f"{key}: file {a}, model {b}" for key, a, b in found.incorrect_shapes}
    wanted = stray(model.state_dict(), _HARMLESS)
    matched = len({*wanted} - {*found.missing_keys, *shapes})
    problems = {
        "missing in the file": stray([key for key in found.missing_keys if key not in shapes]),
        "in the file but not in the model": stray(found.unexpected_keys),
        "of another shape": [shapes[key] for key in stray(shapes)],
    }
    if any(problems.values()) or not matched:
        lists = "\n".join(f"  {what} ({len(k)}): {some(k)}" for what, k in problems.items() if k)
        raise ValueError(
            f"The teacher's weights {weights} do not fit the model of its config: {matched} of "
            f"{len(wanted)} tensors matched.\n{lists}\nGive the config the weights were trained "
            "with as KD.TEACHER.CONFIG_FILE, or list harmless keys in KD.TEACHER.IGNORE_KEYS."
        )
    _logger.info("Teacher: %d of %d tensors loaded from %s", matched, len(wanted), weights)
    return path
