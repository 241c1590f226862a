"""
From what distillers want to what models give: done once, when the model is built.

Captures are resolved, both models run once on a blank image (`probe`), pyramids are paired by their
strides, and adapters are built for the pairs.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import nn

from kd_det.distillation.active import ActiveDistiller, ResolvedCapture, WeightSchedule
from kd_det.distillation.auto_weight import AutoWeight
from kd_det.distillation.capture import CapturePath, FeatureCapture
from kd_det.distillation.pairing import build_adapters, pair_levels
from kd_det.distillation.probe import Probe, probe
from kd_det.distillation.teacher import Teacher
from kd_det.distillation.views import View
from kd_det.distillers import CaptureSpec, Distiller
from kd_det.distillers.predictions import DensePredictions, HeadOutputs, decoder_of

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """
    What is captured of both models in one step.

    Attributes:
        student, teacher: the captures of all active distillers.
        stop_after: captures of the teacher after which its pass ends.
    """

    student: FeatureCapture
    teacher: FeatureCapture
    stop_after: int


def activate(
    *,
    student: nn.Module,
    teacher: Teacher,
    view: View,
    distillers: Mapping[str, Distiller],
    schedules: Mapping[str, WeightSchedule],
    autos: Mapping[str, AutoWeight],
    resample: bool,
) -> tuple[Watch, dict[str, ActiveDistiller]]:
    """
    Resolve the captures of all distillers, pair the pyramids, build the adapters.

    Args:
        student: the plain student.
        teacher: the loaded teacher.
        view: the student's view.
        distillers, schedules: by entry of KD.DISTILLERS.
        autos: the weights that set themselves.
        resample: pair levels on different grids too.

    Raises:
        ValueError: a path names no module, a capture is no pyramid, or nothing pairs.
        RuntimeError: a module that is to be captured does not run.
        TypeError: a distiller wants predictions, and nothing decodes this teacher's.
    """
    wanted = {
        name: [_resolve(spec, student, teacher.model) for spec in distiller.captures()]
        for name, distiller in distillers.items()
    }
    everything = [item for items in wanted.values() for item in items]
    student_capture = FeatureCapture(student, [w.student for w in everything if w.student])
    teacher_capture = FeatureCapture(teacher.model, [w.teacher for w in everything if w.teacher])
    own = probe(student, student_capture, view.factor)
    other = probe(teacher.model, teacher_capture, teacher.view.factor)

    active: dict[str, ActiveDistiller] = {}
    rows: list[list[Any]] = []
    for name, distiller in distillers.items():
        captures, adapters = [], {}
        for item in wanted[name]:
            if item.spec.kind == "pyramid":
                item, adapters[item.spec.name] = _pair(item, own, other, distiller, resample)
                rows += [[name, *row] for row in _rows(item, adapters[item.spec.name], own, other)]
            captures.append(item)
        active[name] = ActiveDistiller(
            name=name,
            distiller=distiller,
            schedule=schedules[name],
            auto=autos.get(name),
            captures=captures,
            adapters=adapters,
            decode=_decoder(captures, teacher),
        )
    headers = ["distiller", "student level", "teacher level", "adapter", "resampled"]
    _logger.info("Paired pyramid levels:\n%s", tabulate(rows, headers=headers))
    watch = Watch(
        student_capture, teacher_capture, teacher_capture.count_needed(other.captures.order)
    )
    return watch, active


def _decoder(
    captures: list[ResolvedCapture], teacher: Teacher
) -> Callable[[HeadOutputs], DensePredictions] | None:
    """Return what reads the teacher's head outputs, in the loaded image's pixels, where wanted."""
    if all(item.spec.kind != "predictions" for item in captures):
        return None
    decode = decoder_of(teacher.model)
    return lambda head_outputs: decode(head_outputs).scaled(teacher.view.factor)


def _resolve(spec: CaptureSpec, student: nn.Module, teacher: nn.Module) -> ResolvedCapture:
    if spec.teacher is None or (spec.kind == "pyramid") != (spec.student is not None):
        raise ValueError(
            f"The capture {spec} makes no sense: a pyramid needs a path in both models, "
            "predictions one in the teacher alone."
        )
    return ResolvedCapture(
        spec,
        None if spec.student is None else CapturePath.parse(spec.student, student),
        CapturePath.parse(spec.teacher, teacher),
    )


def _pair(
    item: ResolvedCapture, own: Probe, other: Probe, distiller: Distiller, resample: bool
) -> tuple[ResolvedCapture, nn.ModuleList]:
    """Pair the levels of a pyramid capture and build their adapters."""
    assert item.student is not None and item.teacher is not None
    levels = own.levels(item.student), other.levels(item.teacher)
    pairs = pair_levels(*levels, resample=resample)
    adapters = build_adapters(pairs, *levels, mode=distiller.adapter).to(own.device)
    return replace(item, pairs=tuple(pairs)), adapters


def _rows(
    item: ResolvedCapture, adapters: nn.ModuleList, own: Probe, other: Probe
) -> list[list[Any]]:
    """Return a line per pair for the log: both levels, adapter, whether resampled."""
    assert item.student is not None and item.teacher is not None
    levels = own.levels(item.student), other.levels(item.teacher)
    return [
        [
            str(levels[0][pair.student]),
            str(levels[1][pair.teacher]),
            "-" if isinstance(adapter, nn.Identity) else "1x1",
            pair.resample,
        ]
        for pair, adapter in zip(item.pairs, adapters, strict=True)
    ]
