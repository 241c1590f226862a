"""
From what distillers want to what models give: done once, when the model is built.

Captures are resolved, both models run once on a blank image (`probe`), pyramids are paired by their
strides, and adapters are built for the pairs.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from kd_det.distillation.active import ActiveDistiller, Decode, ResolvedCapture, WeightSchedule
from kd_det.distillation.auto_weight import AutoWeight
from kd_det.distillation.capture import CapturePath, FeatureCapture
from kd_det.distillation.guiding import check_guides
from kd_det.distillation.pairing import LevelPair, build_adapters, pair_levels
from kd_det.distillation.positions import pair_predictions
from kd_det.distillation.probe import Probe, probe
from kd_det.distillation.teacher import Teacher
from kd_det.distillation.views import View
from kd_det.distillers import CaptureSpec, Distiller, LevelShape, TeacherModule
from kd_det.distillers.predictions import decoder_of

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
        ValueError: a path names no module, a capture is no pyramid, nothing pairs, or a distiller
            cannot serve these models.
        RuntimeError: a module that is to be captured does not run.
        TypeError: a distiller wants predictions, and nothing decodes this teacher's; or it wants
            the student to assign by them, and the student cannot.
    """
    wanted = {
        name: [
            _resolve(name, distiller, spec, student, view, teacher) for spec in distiller.captures()
        ]
        for name, distiller in distillers.items()
    }
    everything = [item for items in wanted.values() for item in items]
    student_capture = FeatureCapture(student, [w.student for w in everything if w.student])
    teacher_capture = FeatureCapture(teacher.model, [w.teacher for w in everything if w.teacher])
    own = probe(student, student_capture, view.factor, role="student")
    other = probe(teacher.model, teacher_capture, teacher.view.factor, role="teacher")

    active: dict[str, ActiveDistiller] = {}
    rows: list[list[Any]] = []
    for name, distiller in distillers.items():
        captures, adapters = [], {}
        shapes: dict[str, list[LevelShape]] = {}
        for item in wanted[name]:
            if item.spec.kind == "pyramid" and item.student is None:
                item = _own_levels(item, other)
                shapes[item.spec.name] = _shapes(item, other)
            elif item.spec.kind == "pyramid":
                item, adapters[item.spec.name] = _pair(item, own, other, distiller, resample)
                rows += [[name, *row] for row in _rows(item, adapters[item.spec.name], own, other)]
                shapes[item.spec.name] = _shapes(item, other)
            elif item.decode_teacher is not None and item.student is None:
                shapes[item.spec.name] = _predicted(item, other)
            elif item.decode_student is not None:
                item = _pair_predictions(item, own, other, distiller)
                _tell_of_other_scores(name, distiller, student, teacher.model)
                rows += [[name, pair.name, pair.name, "-", False] for pair in item.pairs]
            captures.append(item)
        distiller.build(shapes, {x.spec.name: x.module for x in captures if x.module is not None})
        distiller.to(own.device)
        active[name] = ActiveDistiller(
            name=name,
            distiller=distiller,
            schedule=schedules[name],
            auto=autos.get(name),
            captures=captures,
            adapters=adapters,
        )
    check_guides(student, active, other, view.factor)
    headers = ["distiller", "student level", "teacher level", "adapter", "resampled"]
    _logger.info("Paired pyramid levels:\n%s", tabulate(rows, headers=headers))
    watch = Watch(
        student_capture, teacher_capture, teacher_capture.count_needed(other.captures.order)
    )
    return watch, active


def _resolve(
    name: str,
    distiller: Distiller,
    spec: CaptureSpec,
    student: nn.Module,
    view: View,
    teacher: Teacher,
) -> ResolvedCapture:
    sides = spec.student is not None, spec.teacher is not None
    if spec.kind == "module" and sides == (False, True):
        module = teacher.model.get_submodule(str(spec.teacher))
        shared = TeacherModule(module, teacher.autocast, teacher.view.factor)
        return ResolvedCapture(spec, None, None, module=shared)
    if spec.kind == "module" or not sides[1]:
        raise ValueError(
            f"The capture {spec} makes no sense: pyramids and predictions need a path in the "
            "teacher or in both models, a module one in the teacher alone."
        )
    dense = spec.kind == "predictions"
    # First: a model without dense predictions has none of the modules that give them either.
    decode_student = _decoder(student, view.factor) if dense and sides[0] else None
    decode_teacher = _decoder(teacher.model, teacher.view.factor) if dense else None
    own = None
    if spec.student is not None:
        place = _place(name, distiller, spec, "student")
        own = _path(spec.student, student, spec.advice, place)
    place = _place(name, distiller, spec, "teacher")
    other = _path(str(spec.teacher), teacher.model, spec.advice, place)
    return ResolvedCapture(
        spec,
        own,
        other,
        decode_student=decode_student,
        decode_teacher=decode_teacher,
    )


def _path(text: str, model: nn.Module, advice: str, place: str) -> CapturePath:
    """Return where a model is captured; an error says from which place the wish comes."""
    try:
        with _advice(advice):
            path = CapturePath.parse(text, model)
            path.expect_in(model)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return path


def _place(name: str, distiller: Distiller, spec: CaptureSpec, side: str) -> str:
    """Return the key that says what is captured of a side; else whose capture it is."""
    node, key = CfgNode(), f"{side.upper()}_CAPTURE"
    distiller.add_config(node)
    # Of a distiller's captures, these keys mean the one of its pyramids.
    if spec.name != "features" or key not in node:
        return f"{name}, of the {side}"
    _, colon, label = name.partition(":")
    return f"KD.{distiller.config_key}{colon}{label}.{key}"


def _decoder(model: nn.Module, view_factor: float) -> Decode:
    """Return what reads a model's head outputs, in the loaded image's pixels."""
    decode = decoder_of(model)
    return lambda head_outputs: decode(head_outputs).scaled(view_factor)


def _pair_predictions(
    item: ResolvedCapture, own: Probe, other: Probe, distiller: Distiller
) -> ResolvedCapture:
    """Pair the positions of both dense heads."""
    assert item.student is not None and item.teacher is not None
    assert item.decode_student is not None and item.decode_teacher is not None
    pairs = pair_predictions(
        own.predictions(item.student, item.decode_student),
        other.predictions(item.teacher, item.decode_teacher),
        classes=distiller.uses_class_scores,
        bins=item.spec.bins,
    )
    return replace(item, pairs=tuple(pairs[: item.spec.levels or None]))


def _tell_of_other_scores(
    name: str, distiller: Distiller, student: nn.Module, teacher: nn.Module
) -> None:
    """Warn where class scores of detectors of different kinds are compared."""
    kinds = type(student).__name__, type(teacher).__name__
    if distiller.uses_class_scores and kinds[0] != kinds[1]:
        _logger.warning(
            "%s compares class scores of a student %s with those of a teacher %s: they may "
            "mean different things (GFL's include the quality of the box, FCOS's do not). Look at "
            "the gain beside its control, or take a teacher of the student's kind.",
            name,
            *kinds,
        )


def _own_levels(item: ResolvedCapture, other: Probe) -> ResolvedCapture:
    """Sort the levels of a pyramid of the teacher alone."""
    assert item.teacher is not None
    pairs = [
        LevelPair(i, i, level.name, level.stride, 1.0)
        for i, level in enumerate(other.levels(item.teacher))
    ]
    return replace(item, pairs=tuple(sorted(pairs, key=lambda pair: pair.stride)))


def _shapes(item: ResolvedCapture, other: Probe) -> list[LevelShape]:
    assert item.teacher is not None
    levels = other.levels(item.teacher)
    return [LevelShape(x.name, x.stride, levels[x.teacher].channels) for x in item.pairs]


def _predicted(item: ResolvedCapture, other: Probe) -> list[LevelShape]:
    """Return the levels at which the teacher predicts."""
    assert item.teacher is not None and item.decode_teacher is not None
    found = other.predictions(item.teacher, item.decode_teacher)
    return [
        LevelShape(f"stride {stride:g}", stride, logits.shape[-1])
        for stride, logits in zip(found.strides, found.logits, strict=True)
    ]


def _pair(
    item: ResolvedCapture, own: Probe, other: Probe, distiller: Distiller, resample: bool
) -> tuple[ResolvedCapture, nn.ModuleList]:
    """Pair the levels of a pyramid capture and build their adapters."""
    assert item.student is not None and item.teacher is not None
    levels = own.levels(item.student), other.levels(item.teacher)
    pairs = pair_levels(*levels, resample=resample)[: item.spec.levels or None]
    free = item.spec.adapter is None  # the config's to say
    with _advice("Set the distiller's ADAPTER to 'auto'." if free else item.spec.advice):
        adapters = build_adapters(
            pairs,
            *levels,
            mode=item.spec.adapter or distiller.adapter,
            kernel=distiller.adapter_kernel,
            bias=distiller.adapter_bias,
        )
    return replace(item, pairs=tuple(pairs)), adapters.to(own.device)


@contextlib.contextmanager
def _advice(text: str) -> Iterator[None]:
    """Say after an error what to change."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} {text}".rstrip()) from error


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
            "x".join(map(str, adapter.kernel_size)) if isinstance(adapter, nn.Conv2d) else "-",
            pair.resample,
        ]
        for pair, adapter in zip(item.pairs, adapters, strict=True)
    ]
