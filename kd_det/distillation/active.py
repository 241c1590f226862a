"""One entry of KD.DISTILLERS at work: the distiller, its weight, captures, pairs and adapters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.distillation.auto_weight import AutoWeight
from kd_det.distillation.batch import Frame
from kd_det.distillation.capture import CapturePath, Captures, tensors_of
from kd_det.distillation.gradient_share import Pull, ShareWatch, pull
from kd_det.distillation.pairing import LevelPair, levels_of
from kd_det.distillation.schedule import Schedule
from kd_det.distillers import CaptureSpec, Distiller, Step, Targets, TeacherMap, TeacherModule
from kd_det.distillers.predictions import DensePredictions, HeadOutputs
from kd_det.functional.reduce import mean_over_processes

LossDict = dict[str, Tensor]
# Iteration -> weight.
WeightSchedule = Callable[[int], float]
Decode = Callable[[HeadOutputs], DensePredictions]


@dataclass(frozen=True)
class ResolvedCapture:
    """
    One capture of one distiller, with the modules that its paths name.

    Attributes:
        spec: as the distiller wants it.
        student, teacher: where it is captured.
        pairs: of what both models give, the levels on common grids, from fine to coarse; of the
            teacher alone, each level with itself.
        decode_student, decode_teacher: of predictions, turn raw head outputs into
            `DensePredictions` in the loaded image's pixels.
        module: of kind "module".
    """

    spec: CaptureSpec
    student: CapturePath | None
    teacher: CapturePath | None
    pairs: tuple[LevelPair, ...] = ()
    decode_student: Decode | None = None
    decode_teacher: Decode | None = None
    module: TeacherModule | None = None


class ActiveDistiller(nn.Module):
    """
    A distiller with all that belongs to it.

    Args:
        name: its entry of KD.DISTILLERS.
        distiller: the technique.
        schedule: its weight at every iteration, or the course of a weight that sets itself.
        auto: the latter, if it does.
        captures: resolved, pyramids paired.
        adapters: per pyramid capture, one module per pair.
    """

    def __init__(
        self,
        *,
        name: str,
        distiller: Distiller,
        schedule: WeightSchedule,
        auto: AutoWeight | None,
        captures: list[ResolvedCapture],
        adapters: Mapping[str, nn.ModuleList],
    ) -> None:
        super().__init__()
        self.name = name
        self.distiller = distiller
        self.schedule = schedule
        self.auto = auto
        self.captures = captures
        self.adapters = nn.ModuleDict(adapters)

    @property
    def slug(self) -> str:
        """Its name in loss keys and logged scalars: "ssim", or "ssim:head" for "SSIM:head"."""
        return slug_of(self.name, self.distiller)

    def step(self, student: Captures, teacher: Captures, targets: Targets, frame: Frame) -> Step:
        """
        Sort the captures of both models' passes over one batch into what the distiller sees.

        Args:
            student, teacher: what was captured.
            targets: the batch's ground truth.
            frame: the batch's geometry, common to all distillers.
        """
        features: list[Tensor] = []
        step = Step(
            pairs={},
            teacher={},
            targets=targets,
            features=features,
            loss_normalizer=frame.loss_normalizer,
            rank=comm.get_rank(),
            mean=mean_over_processes,
        )
        for item in self.captures:
            name = item.spec.name
            if item.module is not None:
                step.modules[name] = item.module
                continue
            assert item.teacher is not None
            outputs = teacher.get(item.teacher)
            if item.decode_teacher is not None:
                theirs = item.decode_teacher(outputs[0])
                if item.student is None or item.decode_student is None:
                    step.teacher[name] = theirs
                    continue
                raw = student.get(item.student)[0]
                mine = item.decode_student(raw)
                step.predictions[name] = [frame.predictions(x, mine, theirs) for x in item.pairs]
                features += tensors_of(raw)
                continue
            other = levels_of(outputs, item.teacher)
            if item.student is None:
                step.maps[name] = [TeacherMap(x.stride, other[x.teacher][1]) for x in item.pairs]
                continue
            own = levels_of(student.get(item.student), item.student)
            step.pairs[name] = [
                frame.pair(pair, own[pair.student][1], other[pair.teacher][1], adapter)
                for pair, adapter in zip(
                    item.pairs, cast(nn.ModuleList, self.adapters[name]), strict=True
                )
            ]
            features += [own[pair.student][1] for pair in item.pairs]
        return step

    def guide(self, teacher: Captures, *, changed: bool = False) -> DensePredictions | None:
        """
        Return the teacher's predictions by which the student assigns its ground truth.

        Args:
            teacher: what was captured of its pass.
            changed: see `Captures.get`.

        Returns:
            They, in the loaded image's pixels; None where the distiller leaves that to the student.
        """
        for item in self.captures:
            if item.decode_teacher is not None and item.spec.name == self.distiller.guide:
                assert item.teacher is not None
                return item.decode_teacher(teacher.get(item.teacher, changed=changed)[0])
        return None

    def is_awake(self, iteration: int) -> bool:
        """Return whether it distils at this iteration; to be asked once per iteration."""
        course = self.schedule(iteration)
        if self.auto is None:
            return course > 0
        if isinstance(self.schedule, Schedule) and self.schedule.has_stopped(iteration):
            self.auto.freeze()
        return course > 0 and not self.auto.rests()

    def weigh(
        self, parts: dict[str, Tensor], detection: Tensor, step: Step, watch: ShareWatch
    ) -> float:
        """
        Return the weight in force; measure and log the distiller's pull where that is due.

        Args:
            parts: the step's loss, unweighted.
            detection: the sum of the student's own losses.
            step: what the loss was computed from.
            watch: when shares are logged.
        """
        storage = get_event_storage()
        iteration = storage.iter
        calibrating = self.auto is not None and self.auto.calibrating
        watched = watch.is_due(iteration) or watch.is_new(self.slug)
        found = None
        self._expect_gradient(step.features)
        if calibrating or (watched and any(x.requires_grad for x in step.features)):
            found = pull(torch.stack(list(parts.values())).sum(), detection, step.features)
        if self.auto is not None and calibrating and found is not None:
            norms = {"its": found.distiller, "the detection losses'": found.detection}
            self.auto.measure(found.ratio, norms)
        weight = self.schedule(iteration) * (1.0 if self.auto is None else self.auto.weight)
        log_fact(self.slug, "weight", weight)
        if found is not None and watched:
            self._log(found, weight, watch)
        return weight

    def _expect_gradient(self, features: Sequence[Tensor]) -> None:
        if features and torch.is_grad_enabled() and not any(x.requires_grad for x in features):
            paths = sorted({item.spec.student for item in self.captures if item.spec.student})
            raise ValueError(
                f"{self.name}: what it captures of the student ({', '.join(paths)}) carries no "
                "gradient, so the distiller cannot move it; capture something that trains, or let "
                "what it captures train (MODEL.BACKBONE.FREEZE_AT)."
            )

    def _log(self, found: Pull, weight: float, watch: ShareWatch) -> None:
        ratio, cosine = torch.stack([found.ratio, found.cosine]).tolist()
        for key, value in (("grad_share", ratio * weight), ("cosine", cosine)):
            if math.isfinite(value):
                log_fact(self.slug, key, value)
        if self.auto is not None:
            watch.hear(self.slug, ratio * weight, wanted=self.auto.share)
            return
        # A warm-up or a decay is meant to make the share small.
        full = self.schedule.weight if isinstance(self.schedule, Schedule) else weight
        watch.hear(self.slug, ratio * full)

    def losses(self, parts: dict[str, Tensor], weight: float) -> LossDict:
        """Return the parts of a step's loss, weighted, under their keys."""
        return {loss_key(self.slug, part): value * weight for part, value in parts.items()}

    def idle(self) -> LossDict:
        """
        Return a zero loss that touches the parameters of a distiller that rests; none, if none.

        A parameter without gradient would stall DDP's reduction. All processes rest at the same
        iterations, so their loss keys stay the same.
        """
        modules = (self.distiller, self.adapters)
        parameters = [p.sum() for module in modules for p in module.parameters()]
        if not parameters:
            return {}
        return {loss_key(self.slug, "idle"): torch.stack(parameters).sum() * 0}


def slug_of(name: str, distiller: Distiller | type[Distiller]) -> str:
    """Return the name of an entry of KD.DISTILLERS in loss keys and logged scalars."""
    _, colon, label = name.partition(":")
    return f"{distiller.config_key.lower()}{colon}{label}"


def log_fact(slug: str, quantity: str, value: float) -> None:
    """
    Log kd/<distiller>/<quantity> as it is.

    Detectron2's writers otherwise give the median of the last 20 values: of shares, which are
    measured seldom, that is one of thousands of iterations ago.
    """
    get_event_storage().put_scalar(f"kd/{slug}/{quantity}", value, smoothing_hint=False)


def loss_key(slug: str, part: str) -> str:
    """Return the key of a loss in the model's loss dict: `loss_kd_<distiller>[_<part>]`."""
    return f"loss_kd_{slug}_{part}" if part else f"loss_kd_{slug}"
