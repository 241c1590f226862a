"""Which classes a model predicts, and whether two models predict the same ones."""

import itertools
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from kd_det.data.annotation_file import read_class_names
from kd_det.text import some


def check_same_classes(
    student: nn.Module, teacher: nn.Module, student_cfg: CfgNode, teacher_cfg: CfgNode
) -> None:
    """
    Compare what two models and the full configs of their runs say of their classes.

    Raises:
        ValueError: class counts, or names of the training data's classes, differ.
    """
    check_same_counts(student, teacher)
    names = class_names(student_cfg), class_names(teacher_cfg)
    if names[0] and names[1] and names[0] != names[1]:
        pairs = enumerate(itertools.zip_longest(*names, fillvalue="none"))
        differing = [f"{i}: {a} / {b}" for i, (a, b) in pairs if a != b]
        raise ValueError(
            "Student and teacher name their classes differently, and a distiller reads class "
            f"scores (index: student / teacher): {some(differing)}."
        )


def check_same_counts(student: nn.Module, teacher: nn.Module) -> None:
    """
    Compare how many classes two models predict.

    Raises:
        ValueError: they differ.
    """
    counts = class_count(student), class_count(teacher)
    if counts[0] != counts[1]:
        raise ValueError(
            f"The student predicts {counts[0]} classes, the teacher {counts[1]}, and a distiller "
            "reads class scores; both must be trained on the same classes."
        )


def class_count(model: nn.Module) -> int | None:
    """
    Return the number of object classes a model predicts; None where it does not say.

    A model says so by an attribute `num_classes` of its own, as dense detectors have, or of its
    `roi_heads`.
    """
    for module in (model, getattr(model, "roi_heads", None)):
        count = getattr(module, "num_classes", None)
        if isinstance(count, int):
            return count
    return None


def class_names(cfg: CfgNode) -> list[str]:
    """Return the class names of a full config's first training set; empty if they are not known."""
    if not cfg.DATASETS.TRAIN:
        return []
    name = cfg.DATASETS.TRAIN[0]
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    # A teacher's own data need not be registered, nor be on this machine.
    listed = (item["json"] for item in cfg.KD.DATASETS if item["name"] == name)
    file = metadata.get("json_file") or next(listed, None)
    if names is None and file and os.path.isfile(file):
        # Detectron2 fills the names in when the set is loaded, in the order of the category ids.
        names = read_class_names(Path(file))
    return list(names or [])
