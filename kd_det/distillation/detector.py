"""
The meta-architecture that wraps a student and its teacher.

In training it returns the student's own losses and `loss_kd_*`; in evaluation it is the student.
With no distillers it is the student in training too: same losses, bit for bit.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.config import student_cfg
from kd_det.distillation.active import Wiring, wire
from kd_det.distillation.gradient_share import GradientShare
from kd_det.distillation.inherit import inherit
from kd_det.distillation.schedule import Schedule
from kd_det.distillation.teacher import Teacher, build_teacher
from kd_det.distillation.views import View
from kd_det.distillers import Distiller, Step, Targets, build_distiller, loss_key
from kd_det.modeling.msad.aligned import AlignedMultiScaleDetector
from kd_det.text import nearest

_logger = logging.getLogger(__name__)

LossDict = dict[str, Tensor]


@META_ARCH_REGISTRY.register()
class DistillationDetector(nn.Module):
    """
    A student that learns from its ground truth and from a frozen teacher.

    Attributes:
        student: the plain Detectron2 model; what ships.
        adapters: per distiller and capture, the 1x1 convolutions of its pairs; dropped after
            training.
        teacher: the frozen teacher, or None; not a submodule.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        distillers: dict[str, Distiller] | None = None,
        schedules: dict[str, Callable[[int], float]] | None = None,
        view: View | None = None,
        inherit_patterns: Sequence[str] = (),
        resample_levels: bool = False,
        grad_share_period: int = 0,
    ) -> None:
        """
        Args:
            student: any Detectron2 meta-architecture, unmodified.
            teacher: needed where there are distillers or patterns to inherit.
            distillers: active distillers by registry name.
            schedules: per distiller, iteration -> weight.
            view: what the student sees of the loaded image.
            inherit_patterns: see `KD.INHERIT`; applied by `inherit_from_teacher`.
            resample_levels: see `KD.RESAMPLE_LEVELS`.
            grad_share_period: see `KD.GRAD_SHARE_PERIOD`.

        Raises:
            ValueError: a capture path, the pyramids or the adapters do not fit the models.
        """
        super().__init__()
        distillers = distillers or {}
        if teacher is None and (distillers or inherit_patterns):
            raise ValueError("Distillers and KD.INHERIT need a teacher, and none was given.")
        self.student = student
        # A plain object, not a module: the teacher must not reach the optimizer, the checkpoint,
        # DDP or .train().
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.schedules = schedules or {}
        self.view = view or View()
        self.inherit_patterns = tuple(inherit_patterns)
        self.adapters = nn.ModuleDict()
        self.gradient_share = GradientShare(grad_share_period)
        self.wiring: Wiring | None = None
        if teacher is not None:
            _compare_views(self.view, teacher.model)
        if teacher is not None and distillers:
            with unchanged_rng():  # adapters draw their first weights
                self.wiring = wire(
                    student=student,
                    teacher=teacher,
                    view=self.view,
                    distillers=distillers,
                    resample=resample_levels,
                )
            self.adapters.update(self.wiring.adapters)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Translate KD.*; the student is built first, so that it starts like a plain model does."""
        name = cfg.KD.STUDENT.META_ARCHITECTURE
        known = [key for key, _ in META_ARCH_REGISTRY if key != cls.__name__]
        if name not in known:
            raise KeyError(
                f"KD.STUDENT.META_ARCHITECTURE is {name!r}, which is no meta-architecture; "
                f"{nearest(name, known)}."
            )
        student = build_model(student_cfg(cfg))
        with unchanged_rng():  # so does building the teacher
            distillers = {key: build_distiller(key, cfg) for key in cfg.KD.DISTILLERS}
            teacher = None
            if distillers or cfg.KD.INHERIT:
                reads_scores = any(d.uses_class_scores for d in distillers.values())
                teacher = build_teacher(cfg, check_classes=reads_scores)
        return {
            "student": student,
            "teacher": teacher,
            "distillers": distillers,
            "schedules": {
                key: Schedule.from_config(cfg.KD[d.config_key], cfg.SOLVER.MAX_ITER)
                for key, d in distillers.items()
            },
            "view": View(cfg.KD.STUDENT.VIEW_FACTOR, cfg.KD.STUDENT.VIEW_INTERPOLATION),
            "inherit_patterns": cfg.KD.INHERIT,
            "resample_levels": cfg.KD.RESAMPLE_LEVELS,
            "grad_share_period": cfg.KD.GRAD_SHARE_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return next(self.student.parameters()).device

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "DistillationDetector":
        """Move the teacher along with `.to()`, `.cuda()` and the like."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher.model._apply(fn)
        return self

    def inherit_from_teacher(self) -> list[str]:
        """
        Copy what `KD.INHERIT` names from the teacher; return the copied keys.

        Without distillers the teacher has done its work by then, and is let go.
        """
        if not self.inherit_patterns or self.teacher is None:
            return []
        copied = inherit(self.student, self.teacher.model, self.inherit_patterns)
        if not self.distillers:
            self.teacher = None
        return copied

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Run one step, or evaluate.

        Args:
            batched_inputs: Detectron2's inputs, as loaded.

        Returns:
            In training, the student's losses and `loss_kd_*`; in evaluation, the student's outputs.
        """
        # Once for both models; views are computed where the models run.
        batched_inputs = [
            {**item, "image": item["image"].to(self.device, non_blocking=True)}
            for item in batched_inputs
        ]
        inputs = self.view(batched_inputs)
        if not self.training:
            return self.view.restore(self.student(inputs), batched_inputs)
        iteration = get_event_storage().iter
        weights = {key: schedule(iteration) for key, schedule in self.schedules.items()}
        for key, weight in weights.items():
            get_event_storage().put_scalar(f"kd/{self.distillers[key].slug}/weight", weight)
        if not any(weights.values()) or self.wiring is None or self.teacher is None:
            return {**self.student(inputs), **self._idle(self.distillers)}
        return self._distil(batched_inputs, inputs, weights, iteration)

    def _distil(
        self,
        batched_inputs: list[dict[str, Any]],
        inputs: list[dict[str, Any]],
        weights: dict[str, float],
        iteration: int,
    ) -> LossDict:
        wiring, teacher = self.wiring, self.teacher
        assert wiring is not None and teacher is not None
        with wiring.student_capture.record() as student_captures:
            detection: LossDict = self.student(inputs)
        teacher_captures = teacher(batched_inputs, wiring.teacher_capture, wiring.stop_after)
        targets = targets_of(batched_inputs)

        losses = dict(detection)
        features: dict[str, list[Tensor]] = {}
        distilled: dict[str, Tensor] = {}
        for key, module in self.distillers.items():
            distiller = cast(Distiller, module)
            if not weights[key]:
                losses.update(self._idle([key]))
                continue
            seen = wiring.gather(key, student_captures, teacher_captures, targets.image_sizes)
            step = Step(
                pairs=seen.pairs(self.adapters),
                student=seen.student,
                teacher=seen.teacher,
                targets=targets,
            )
            parts = {p: v * weights[key] for p, v in distiller(step).items()}
            losses.update({loss_key(distiller, part): value for part, value in parts.items()})
            features[distiller.slug] = seen.student_features
            distilled[distiller.slug] = torch.stack(list(parts.values())).sum()
        if self.gradient_share.is_due(iteration):
            self.gradient_share.measure(detection, distilled, features)
        return losses

    def _idle(self, keys: Any) -> LossDict:
        """
        Zero losses that touch the adapters of distillers that rest.

        A parameter without gradient would stall DDP's reduction. All processes rest at the same
        iterations, so their loss keys stay the same.
        """
        out: LossDict = {}
        for key in keys:
            modules = [m for name, m in self.adapters.items() if name.startswith(f"{key}-")]
            modules.append(self.distillers[key])
            parameters = [p for module in modules for p in module.parameters()]
            if parameters:
                out[loss_key(cast(Distiller, self.distillers[key]), "idle")] = (
                    torch.stack([p.sum() for p in parameters]).sum() * 0
                )
        return out


def _compare_views(view: View, teacher: nn.Module) -> None:
    """Warn where the student's small image is not the one that an aligned teacher learned on."""
    if view.factor == 1 or not isinstance(teacher, AlignedMultiScaleDetector):
        return
    if (view.factor, view.interpolation) != (teacher.factor, teacher.interpolation):
        _logger.warning(
            "The student sees images reduced by %g (%s), but the aligned teacher learned on images "
            "reduced by %g (%s). Set KD.STUDENT.VIEW_FACTOR and VIEW_INTERPOLATION to what the "
            "teacher's MODEL.ALIGNED has, unless that is the experiment.",
            view.factor,
            view.interpolation,
            teacher.factor,
            teacher.interpolation,
        )


def unchanged_rng() -> contextlib.AbstractContextManager[None]:
    """
    Leave the random state as it was, so that arms with and without a teacher train on the same
    data.

    Models draw their first weights on the CPU; other devices' generators are not touched.
    """
    return torch.random.fork_rng(devices=[])


def targets_of(batched_inputs: list[dict[str, Any]]) -> Targets:
    """Collect the ground truth of a batch in the loaded image's frame, on the CPU."""
    instances = [item["instances"] for item in batched_inputs]
    return Targets(
        boxes=[x.gt_boxes.tensor.cpu() for x in instances],
        classes=[x.gt_classes.cpu() for x in instances],
        image_sizes=[(item["image"].shape[-2], item["image"].shape[-1]) for item in batched_inputs],
        ignored=[item.get("ignored_boxes", torch.zeros(0, 4)).cpu() for item in batched_inputs],
    )
