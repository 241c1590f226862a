"""
The meta-architecture that wraps a student and its teacher.

In training it returns the student's own losses and `loss_kd_*`; in evaluation it is the student.
With no distillers it is the student in training too: same losses, bit for bit.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.config import starts_trained, student_cfg
from kd_det.distillation.activate import activate
from kd_det.distillation.active import ActiveDistiller, LossDict, WeightSchedule, log_fact
from kd_det.distillation.auto_weight import AutoWeight, auto_weights
from kd_det.distillation.batch import Frame, targets_of
from kd_det.distillation.gradient_share import ShareWatch, measuring_period
from kd_det.distillation.guiding import guided
from kd_det.distillation.inherit import inherit
from kd_det.distillation.schedule import Schedule
from kd_det.distillation.teacher import Teacher, build_teacher, has_net_of
from kd_det.distillation.unchanged import unchanged_rng
from kd_det.distillation.views import View
from kd_det.distillers import Distiller, Step, build_distiller
from kd_det.modeling.registering import register_in
from kd_det.text import nearest

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """
    What both models say of one batch.

    Attributes:
        outputs: the student's own: its losses in training, its detections in evaluation.
        steps: what each active distiller sees, by its entry of KD.DISTILLERS.
    """

    outputs: Any
    steps: dict[str, Step]


@register_in(META_ARCH_REGISTRY)
class DistillationDetector(nn.Module):
    """
    A student that learns from its ground truth and from a frozen teacher.

    Attributes:
        student: the plain Detectron2 model; what ships.
        active: the active distillers by their entry of KD.DISTILLERS; with their adapters they are
            dropped after training.
        teacher: the frozen teacher, or None; not a submodule.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        distillers: Mapping[str, Distiller] | None = None,
        schedules: Mapping[str, WeightSchedule] | None = None,
        autos: Mapping[str, AutoWeight] | None = None,
        view: View | None = None,
        inherit_patterns: Sequence[str] = (),
        resample_levels: bool = False,
        grad_share_period: int = 0,
    ) -> None:
        """
        Args:
            student: any Detectron2 meta-architecture, unmodified.
            teacher: needed where there are distillers or patterns to inherit.
            distillers: by entry of KD.DISTILLERS.
            schedules: of each distiller, iteration -> weight; 1 where there is none.
            autos: weights that set themselves; the schedule is their course then.
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
        self.view = view or View()
        self.inherit_patterns = tuple(inherit_patterns)
        self.share_watch = ShareWatch(grad_share_period)
        self.active: Mapping[str, ActiveDistiller] = nn.ModuleDict()  # type: ignore[assignment]
        if teacher is not None:
            _compare_views(self.view, teacher.model)
        if teacher is not None and distillers:
            with unchanged_rng():  # adapters draw their first weights
                self.watch, active = activate(
                    student=student,
                    teacher=teacher,
                    view=self.view,
                    distillers=distillers,
                    schedules={name: (schedules or {}).get(name, _one) for name in distillers},
                    autos=autos or {},
                    resample=resample_levels,
                )
            self.active = nn.ModuleDict(active)  # type: ignore[assignment]

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
                teacher = build_teacher(cfg, same_classes_as=student if reads_scores else None)
        return {
            "student": student,
            "teacher": teacher,
            "distillers": distillers,
            "schedules": {key: Schedule.of(key, cfg) for key in distillers},
            "autos": auto_weights(
                cfg,
                distillers,
                trained=starts_trained(cfg),
                kin=teacher is not None and has_net_of(student, teacher.model),
            ),
            "view": View(cfg.KD.STUDENT.VIEW_FACTOR, cfg.KD.STUDENT.VIEW_INTERPOLATION),
            "inherit_patterns": cfg.KD.INHERIT,
            "resample_levels": cfg.KD.RESAMPLE_LEVELS,
            "grad_share_period": measuring_period(cfg.KD.GRAD_SHARE_PERIOD, cfg.SOLVER.MAX_ITER),
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
        if not self.active:
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
        batched_inputs = self._on_device(batched_inputs)
        if not self.training:
            outputs = self.student(self.view(batched_inputs))
            return self.view.restore(outputs, batched_inputs)
        iteration = get_event_storage().iter
        awake: list[str] = []
        # Without gradients a pass in training mode is for the student's statistics (PreciseBN).
        if torch.is_grad_enabled():
            awake = [name for name, active in self.active.items() if active.is_awake(iteration)]
        if not awake:
            return {**self.student(self.view(batched_inputs)), **self._idle(self.active)}
        return self._distil(batched_inputs, awake)

    def observe(
        self, batched_inputs: list[dict[str, Any]], names: Sequence[str] | None = None
    ) -> Observation:
        """
        Run both models on a batch, the teacher only as far as the distillers look.

        Training sums the losses of the steps; pictures and checks read the same steps. Gradients
        and modes are the caller's choice.

        Args:
            batched_inputs: Detectron2's inputs, as loaded.
            names: the active distillers whose steps are wanted; None for all.

        Raises:
            RuntimeError: there is no active distiller, so nothing to observe.
        """
        if self.teacher is None or not self.active:
            raise RuntimeError(
                "No distiller is active (KD.DISTILLERS), so there is no step to see."
            )
        batched_inputs = self._on_device(batched_inputs)
        chosen = {k: a for k, a in self.active.items() if names is None or k in names}
        teacher = self.teacher(batched_inputs, self.watch.teacher, self.watch.stop_after)
        with (
            guided(self.student, chosen.values(), teacher, self.view.factor),
            self.watch.student.record() as student,
        ):
            outputs = self.student(self.view(batched_inputs))
        targets = targets_of(
            batched_inputs, boxes=any(a.distiller.needs_boxes for a in self.active.values())
        )
        frame = Frame.of(targets.image_sizes, self.device, self.student)
        steps = {
            name: active.step(student, teacher, targets, frame) for name, active in chosen.items()
        }
        return Observation(outputs, steps)

    def _on_device(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Move the images once for both models; views are computed where the models run."""
        return [
            {**item, "image": item["image"].to(self.device, non_blocking=True)}
            for item in batched_inputs
        ]

    def _distil(self, batched_inputs: list[dict[str, Any]], awake: list[str]) -> LossDict:
        seen = self.observe(batched_inputs, awake)
        losses: LossDict = dict(seen.outputs)
        detection = torch.stack([value.float() for value in seen.outputs.values()]).sum()
        for name, active in self.active.items():
            if name not in awake:
                losses.update(self._idle({name: active}))
                continue
            parts = active.distiller(seen.steps[name])
            weight = active.weigh(parts, detection, seen.steps[name], self.share_watch)
            # 0 where nothing could be measured yet: what overflowed times 0 would not be 0.
            losses.update(active.losses(parts, weight) if weight else active.idle())
        return losses

    @staticmethod
    def _idle(active: Mapping[str, ActiveDistiller]) -> LossDict:
        """Return the zero losses of distillers that rest."""
        for one in active.values():
            log_fact(one.slug, "weight", 0.0)
        return {key: loss for one in active.values() for key, loss in one.idle().items()}


def _one(iteration: int) -> float:
    return 1.0


def _compare_views(view: View, teacher: nn.Module) -> None:
    """Warn where the student's small image is not the one that the teacher was made for."""
    # A teacher that aligns resolutions says which reduced view it learned on.
    expected = getattr(teacher, "expected_view", None)
    if view.factor == 1 or expected is None:
        return
    factor, interpolation = expected()
    if (view.factor, view.interpolation) != (factor, interpolation):
        _logger.warning(
            "The student sees images reduced by %g (%s), but the aligned teacher learned on images "
            "reduced by %g (%s). Set KD.STUDENT.VIEW_FACTOR and VIEW_INTERPOLATION to what the "
            "teacher's MODEL.ALIGNED has, unless that is the experiment.",
            view.factor,
            view.interpolation,
            factor,
            interpolation,
        )
