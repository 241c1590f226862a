"""What a run trains on, checked against the model that is trained."""

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from kd_det.checkpoint import student_of
from kd_det.config import student_cfg
from kd_det.data.loading import (
    check_boxes,
    check_classes,
    check_classes_evaluated,
    load_training_set,
)
from kd_det.distillation import DistillationDetector
from kd_det.distillation.classes import class_count


def checked_training_set(
    cfg: CfgNode, model: nn.Module, *, evaluated: bool
) -> list[dict[str, Any]]:
    """
    Return the records of DATASETS.TRAIN in Detectron2's format.

    Args:
        cfg: full config.
        model: what is trained on them, with its distillers.
        evaluated: kd_det's evaluators are to read its predictions.

    Raises:
        ValueError: from `load_training_set`; the model's classes are not those of the data, or a
            distiller needs boxes that the data does not have.
    """
    dataset = load_training_set(cfg)
    classes = class_count(student_of(model))
    if classes is not None:
        kind = student_cfg(cfg).MODEL.META_ARCHITECTURE
        check_classes(dataset, cfg.DATASETS.TRAIN, model=kind, num_classes=classes)
        if evaluated:
            check_classes_evaluated(cfg, model=kind, num_classes=classes)
    if isinstance(model, DistillationDetector):
        for name, active in model.active.items():
            if active.distiller.needs_boxes:
                check_boxes(dataset, cfg.DATASETS.TRAIN, name)
    return dataset


def is_stock(kind: type, stock: type, method: str) -> bool:
    """Return whether a class has a class method as `stock` has it, and not one of a user's."""
    own = getattr(kind, method)
    return getattr(own, "__func__", own) is getattr(stock, method).__func__
