"""
From what distillers want to what models give: done once, when the model is built.

Both models run once on a blank image, in evaluation mode. That shows which captures fire, how often
and in what order (so that the teacher can stop early), and each level's real stride and channels
(so that pyramids are paired and adapters sized).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor, nn

from kd_det.distillation.capture import CapturePath, Captures, FeatureCapture, tensors_of
from kd_det.distillation.pairing import (
    Level,
    LevelPair,
    build_adapters,
    levels_of,
    measure_levels,
    on_one_grid,
    pair_levels,
)
from kd_det.distillation.teacher import Teacher
from kd_det.distillation.views import View
from kd_det.distillers import CaptureSpec, Distiller, Pair
from kd_det.distillers.predictions import decode_dense

_logger = logging.getLogger(__name__)

# Side of the blank image: a multiple of every padding divisor in use, and small.
_PROBE_SIDE = 256


@dataclass(frozen=True)
class _Probe:
    """What a full pass over a blank image captured."""

    captures: Captures
    view_factor: float

    def levels(self, path: CapturePath) -> list[Level]:
        maps = levels_of(self.captures.get(path), path)
        return measure_levels(maps, _PROBE_SIDE, self.view_factor)


@dataclass
class _Wanted:
    """One capture of one distiller, resolved."""

    spec: CaptureSpec
    student: CapturePath | None
    teacher: CapturePath | None
    pairs: Sequence[LevelPair] = ()


@dataclass
class Seen:
    """What one distiller sees of one step."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    student_features: list[Tensor]
    levels: dict[str, list[tuple[LevelPair, Tensor, Tensor]]]
    key: str
    image_sizes: Sequence[tuple[int, int]]

    def pairs(self, adapters: nn.ModuleDict) -> dict[str, list[Pair]]:
        """Return the pairs of every pyramid capture, adapters applied, on one grid."""
        sizes = torch.tensor(self.image_sizes, dtype=torch.float32)
        out: dict[str, list[Pair]] = {}
        for name, levels in self.levels.items():
            modules = cast(nn.ModuleList, adapters[adapter_name(self.key, name)])
            out[name] = []
            for (pair, student, teacher), adapter in zip(levels, modules, strict=True):
                student, teacher = on_one_grid(student, teacher, pair, self.image_sizes)
                sizes = sizes.to(student.device, non_blocking=True)
                out[name].append(Pair(pair.name, pair.stride, adapter(student), teacher, sizes))
        return out


@dataclass
class Wiring:
    """Captures, pairs and adapters of all active distillers."""

    student_capture: FeatureCapture
    teacher_capture: FeatureCapture
    stop_after: int
    wanted: dict[str, list[_Wanted]]
    adapters: dict[str, nn.ModuleList]
    teacher: Teacher

    def gather(
        self,
        key: str,
        student: Captures,
        teacher: Captures,
        image_sizes: Sequence[tuple[int, int]],
    ) -> Seen:
        """Sort the captures of one step for the distiller `key`."""
        seen = Seen({}, {}, [], {}, key, image_sizes)
        for item in self.wanted[key]:
            name = item.spec.name
            if item.spec.kind == "pyramid":
                assert item.student is not None and item.teacher is not None
                own = levels_of(student.get(item.student), item.student)
                other = levels_of(teacher.get(item.teacher), item.teacher)
                seen.levels[name] = [
                    (p, own[p.student][1], other[p.teacher][1]) for p in item.pairs
                ]
                seen.student_features += [own[p.student][1] for p in item.pairs]
                continue
            if item.student is not None:
                seen.student[name] = student.get(item.student)
                seen.student_features += tensors_of(seen.student[name])
            if item.teacher is not None:
                outputs: Any = teacher.get(item.teacher)
                if item.spec.kind == "predictions":
                    outputs = decode_dense(self.teacher.model, outputs[0])
                    # In the loaded image's pixels, as the ground truth is.
                    outputs = outputs.scaled(self.teacher.view.factor)
                seen.teacher[name] = outputs
        return seen


def adapter_name(key: str, capture: str) -> str:
    """Return the name under which the adapters of a distiller's capture are kept."""
    return f"{key}-{capture}"


def wire(
    *,
    student: nn.Module,
    teacher: Teacher,
    view: View,
    distillers: Mapping[str, Distiller],
    resample: bool,
) -> Wiring:
    """
    Resolve the captures of all distillers, pair the pyramids, build the adapters.

    Args:
        student: the plain student.
        teacher: the loaded teacher.
        view: the student's view.
        distillers: by registry name.
        resample: pair levels on different grids too.

    Raises:
        ValueError: a path names no module, a capture is no pyramid, or nothing pairs.
        RuntimeError: a module that is to be captured does not run.
    """
    wanted = {
        key: [_resolve(spec, student, teacher.model) for spec in d.captures()]
        for key, d in distillers.items()
    }
    everything = [item for items in wanted.values() for item in items]
    student_capture = FeatureCapture(student, [w.student for w in everything if w.student])
    teacher_capture = FeatureCapture(teacher.model, [w.teacher for w in everything if w.teacher])
    own = _Probe(_probe(student, student_capture), view.factor)
    other = _Probe(_probe(teacher.model, teacher_capture), teacher.view.factor)

    adapters: dict[str, nn.ModuleList] = {}
    rows = []
    for key, items in wanted.items():
        for item in items:
            if item.spec.kind != "pyramid" or item.student is None or item.teacher is None:
                continue
            levels = own.levels(item.student), other.levels(item.teacher)
            item.pairs = pair_levels(*levels, resample=resample)
            built = build_adapters(item.pairs, *levels, mode=distillers[key].adapter)
            device = next(student.parameters()).device
            adapters[adapter_name(key, item.spec.name)] = built.to(device)
            for pair, adapter in zip(item.pairs, built, strict=True):
                inherent = isinstance(adapter, nn.Identity)
                ends = levels[0][pair.student], levels[1][pair.teacher]
                rows.append([key, *map(str, ends), "-" if inherent else "1x1", pair.resample])
    headers = ["distiller", "student level", "teacher level", "adapter", "resampled"]
    _logger.info("Paired pyramid levels:\n%s", tabulate(rows, headers=headers))
    return Wiring(
        student_capture=student_capture,
        teacher_capture=teacher_capture,
        stop_after=teacher_capture.count_needed(other.captures.order),
        wanted=wanted,
        adapters=adapters,
        teacher=teacher,
    )


def _resolve(spec: CaptureSpec, student: nn.Module, teacher: nn.Module) -> _Wanted:
    return _Wanted(
        spec,
        None if spec.student is None else CapturePath.parse(spec.student, student),
        None if spec.teacher is None else CapturePath.parse(spec.teacher, teacher),
    )


@torch.no_grad()
def _probe(model: nn.Module, capture: FeatureCapture) -> Captures:
    """Run the whole model on a blank image in evaluation mode; buffers and modes stay."""
    channels = next((len(b) for n, b in model.named_buffers() if n.endswith("pixel_mean")), 3)
    image = torch.zeros(channels, _PROBE_SIDE, _PROBE_SIDE, device=next(model.parameters()).device)
    with _evaluating(model), capture.record() as captures:
        model([{"image": image}])
    capture.count_needed(captures.order)
    return captures


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and give every module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
