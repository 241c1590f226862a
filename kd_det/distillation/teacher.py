"""
The teacher: built from its own config, loaded strictly, frozen, invisible to training.

It is a plain object and not a module, so its tensors reach no optimizer, no checkpoint, no DDP
bucket and no `.train()`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from torch import nn

from kd_det.config import is_distillation, load_config, student_cfg
from kd_det.config.lazy import is_lazy, load_lazy
from kd_det.distillation.capture import Captures, FeatureCapture
from kd_det.distillation.classes import check_same_classes, check_same_counts
from kd_det.distillation.lazy import input_format, plain_model
from kd_det.distillation.ready_made import build_ready_made, digest_of, is_ready_made
from kd_det.distillation.strict import load_strictly
from kd_det.distillation.views import View
from kd_det.files import sha256_of

_PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        node = cfg.KD.TEACHER
        out = load_config(node.CONFIG_FILE, node.OPTS, source="KD.TEACHER.OPTS")
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
    if is_lazy(cfg.KD.TEACHER.CONFIG_FILE):
        return _from_lazy(cfg, same_classes_as)
    own_cfg = teacher_config(cfg)
    if is_ready_made(own_cfg):
        return _ready_made(cfg, own_cfg)
    weights = teacher_weights(cfg, own_cfg)
    _expect_weights(weights, cfg.KD.TEACHER.CONFIG_FILE)
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


def _expect_weights(weights: str, config_file: str) -> None:
    if not weights or ("://" not in weights and not os.path.isfile(weights)):
        raise FileNotFoundError(
            f"The teacher's weights {weights!r} do not exist. Train it first (train_net.py "
            f"--config-file {config_file}), or set KD.TEACHER.WEIGHTS to its checkpoint."
        )


def _from_lazy(cfg: CfgNode, same_classes_as: nn.Module | None) -> Teacher:
    """Build the teacher whose config is a LazyConfig."""
    node = cfg.KD.TEACHER
    lazy = load_lazy(node.CONFIG_FILE, node.OPTS)
    weights = lazy_weights(node.WEIGHTS, lazy)
    _expect_weights(weights, node.CONFIG_FILE)
    plain = plain_model(lazy)
    if same_classes_as is not None:
        check_same_counts(same_classes_as, plain.model)
    path = load_strictly(plain.model, weights, ignore=node.IGNORE_KEYS)
    return Teacher(
        plain.model.to(cfg.MODEL.DEVICE),
        view=plain.view,
        flip_channels=other_channel_order(cfg.INPUT.FORMAT, input_format(lazy, plain.model)),
        precision=node.PRECISION,
        identity=TeacherIdentity(node.CONFIG_FILE, weights, sha256_of(path)),
    )


def lazy_weights(weights: str, lazy: Any) -> str:
    """Return what `teacher_weights` does, of a teacher whose config is a LazyConfig."""
    if weights == "auto":
        return os.path.join(lazy.get("train", {}).get("output_dir", ""), "model_final.pth")
    return weights


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


def has_net_of(student: nn.Module, teacher: nn.Module) -> bool:
    """
    Return whether the teacher's net below the pyramid holds the student's: R101's holds R50's.

    Of tensors' names and shapes; a norm is the same whether it is frozen or trains.

    Args:
        student, teacher: plain models, with or without pyramids.
    """
    shapes = []
    for model in (student, teacher):
        backbone = getattr(model, "backbone", None)
        net = getattr(backbone, "bottom_up", backbone)
        tensors = {} if net is None else net.state_dict()
        # A count of trained batch norms alone.
        kept = (key for key in tensors if not key.endswith("num_batches_tracked"))
        shapes.append({key: tensors[key].shape for key in kept})
    return bool(shapes[0]) and shapes[0].items() <= shapes[1].items()
