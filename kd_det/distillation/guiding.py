"""Students whose ground truth is assigned by what the teacher predicts."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from kd_det.distillation.active import ActiveDistiller
from kd_det.distillation.capture import Captures
from kd_det.distillation.probe import Probe
from kd_det.distillers.predictions import DensePredictions


@runtime_checkable
class Guidable(Protocol):
    """A student that assigns by predictions and may be given others for a step."""

    def assigning_by(
        self, predictions: DensePredictions
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, it assigns by these, in the pixels of its own input; refuses what cannot fit."""


def check_guides(
    student: nn.Module, active: Mapping[str, ActiveDistiller], teacher: Probe, view_factor: float
) -> None:
    """
    Refuse a student that cannot be assigned by the teacher's predictions, where that is wanted.

    Args:
        student: the plain student.
        active: all active distillers.
        teacher: what the teacher says of a blank image.
        view_factor: pixels of the loaded image per pixel of the student's input.

    Raises:
        ValueError: several distillers want it, or the predictions do not fit the student.
        TypeError: the student's assignment reads no predictions.
    """
    names = [name for name, one in active.items() if one.distiller.guide is not None]
    if not names:
        return
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} both want the student's ground truth to be assigned by what "
            "the teacher predicts for them; leave it to one (ASSIGN_FROM_TEACHER)."
        )
    if not isinstance(student, Guidable):
        raise TypeError(
            f"{names[0]} wants the student's ground truth to be assigned by the teacher's "
            f"predictions (ASSIGN_FROM_TEACHER), but the assignment of {type(student).__name__} "
            "reads none; DDOD's does."
        )
    with guided(student, [active[names[0]]], teacher.captures, view_factor, changed=True):
        pass


def guided(
    student: nn.Module,
    active: Iterable[ActiveDistiller],
    teacher: Captures,
    view_factor: float,
    *,
    changed: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """
    Return the context in which the student sees a batch.

    Args:
        student: the plain student.
        active: the distillers that are awake.
        teacher: what was captured of the teacher's pass over the batch.
        view_factor: pixels of the loaded image per pixel of the student's input.
        changed: of the captures only the shapes count.

    Returns:
        One in which it assigns by the teacher's predictions where a distiller wants that.
    """
    for one in active:
        predictions = one.guide(teacher, changed=changed)
        if predictions is not None:
            assert isinstance(student, Guidable)
            return student.assigning_by(predictions.scaled(1 / view_factor))
    return contextlib.nullcontext()
