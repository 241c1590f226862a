"""The teacher of KD.TEACHER.WEIGHTS "auto": is it there and whole, or to be trained first?"""

import os

from detectron2.config import CfgNode

from kd_det.config import needs_teacher
from kd_det.config.lazy import is_lazy
from kd_det.distillation.ready_made import is_ready_made
from kd_det.distillation.teacher import teacher_config, teacher_weights
from kd_det.reading import what_damages


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
