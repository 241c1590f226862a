"""The teacher's checkpoint: is it there and whole, or to be trained first, and will it stay?"""

import os
import re

from detectron2.config import CfgNode

from kd_det.config import needs_teacher
from kd_det.config.lazy import is_lazy, load_lazy
from kd_det.distillation.ready_made import is_ready_made
from kd_det.distillation.teacher import lazy_weights, teacher_config, teacher_weights
from kd_det.reading import what_damages

# What a run calls its own checkpoints.
_OF_A_RUN = re.compile(r"model_(\d+|final)\.pth")


def absent_teacher(cfg: CfgNode) -> CfgNode | None:
    """
    Return the config of a teacher that is to be trained first; None where none is.

    Its checkpoint is missing or damaged, and it is none that brings its weights itself.

    Raises:
        RefusedFileError: the file in its place is whole, and not one that kd_det wrote.
        FileNotFoundError, KeyError, ValueError: from `teacher_config`.
    """
    if (
        not needs_teacher(cfg)
        or cfg.KD.TEACHER.WEIGHTS != "auto"
        or is_lazy(cfg.KD.TEACHER.CONFIG_FILE)
    ):
        return None
    own_cfg = teacher_config(cfg)
    if is_ready_made(own_cfg):
        return None
    return own_cfg if what_lacks(teacher_weights(cfg, own_cfg)) else None


def what_lacks(weights: str) -> str:
    """Return why a checkpoint cannot be used, for humans; "" where it can."""
    if not os.path.isfile(weights):
        return "is not there yet"
    try:
        damage = what_damages(weights)
    except FileNotFoundError:  # another process of this job has just set it aside
        return "is not there yet"
    return f"is damaged ({damage})" if damage else ""


def expect_own_folder(cfg: CfgNode) -> None:
    """
    Refuse a run that would replace its teacher's checkpoint by its own.

    Raises:
        ValueError: OUTPUT_DIR is the folder of a checkpoint that KD.TEACHER.WEIGHTS names.
        FileNotFoundError, KeyError, ValueError: from `teacher_config`.
    """
    if not needs_teacher(cfg):
        return
    node = cfg.KD.TEACHER
    if is_lazy(node.CONFIG_FILE):
        weights = lazy_weights(node.WEIGHTS, load_lazy(node.CONFIG_FILE, node.OPTS))
    else:
        own_cfg = teacher_config(cfg)
        if is_ready_made(own_cfg):
            return
        weights = teacher_weights(cfg, own_cfg)
    expect_other_folder(weights, cfg.OUTPUT_DIR)


def expect_other_folder(weights: str, output_dir: str) -> None:
    """
    Refuse an output folder in which a run would replace its teacher's checkpoint.

    Args:
        weights: of the teacher.
        output_dir: of the student's run.

    Raises:
        ValueError: they lie in that folder, under a name that a run's own checkpoints have.
    """
    folder, file = os.path.split(os.path.abspath(weights))
    if _OF_A_RUN.fullmatch(file) and os.path.realpath(folder) == os.path.realpath(output_dir):
        raise ValueError(
            f"OUTPUT_DIR {output_dir} is the folder of the teacher's checkpoint {weights}, which "
            "the student's would replace. Give the student, or the teacher, another OUTPUT_DIR "
            "(of a LazyConfig: train.output_dir)."
        )
