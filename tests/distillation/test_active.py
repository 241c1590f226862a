"""Resolving captures, pairing real pyramids, and what distillers get to see of a step."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from torch import Tensor, nn

from kd_det.config import load_config, student_cfg
from kd_det.distillation.detector import DistillationDetector
from kd_det.distillation.teacher import Teacher, build_teacher
from kd_det.distillation.views import View
from kd_det.distillers import CaptureSpec, Distiller, FeatureLp, Step

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]


class Looking(Distiller):
    """Keeps what it is shown."""

    config_key = "LOOKING"

    def __init__(self, specs: Sequence[CaptureSpec]) -> None:
        super().__init__()
        self.specs = specs
        self.adapter = "auto"
        self.step: Step | None = None

    def captures(self) -> Sequence[CaptureSpec]:
        return self.specs

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.step = step
        tensors = [p.student for pairs in step.pairs.values() for p in pairs]
        return {"part": torch.stack([t.sum() for t in tensors] or [torch.zeros(())]).sum()}


def wired(
    tiny_student: Student, teacher: TinyTeacher, *specs: CaptureSpec, **options: Any
) -> tuple[DistillationDetector, Looking, CfgNode]:
    cfg = tiny_student("fcos", teacher)
    looking = Looking(specs)
    model = DistillationDetector(
        student=build_model(student_cfg(cfg)),
        teacher=build_teacher(cfg),
        distillers={"Looking": looking},
        schedules={"Looking": lambda iteration: 1.0},
        **options,
    )
    return model, looking, cfg


def test_pairs_are_the_real_maps_on_one_grid(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("features", "backbone", "backbone")
    model, looking, cfg = wired(tiny_student, tiny_teacher("faster_rcnn"), spec)
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    pairs = looking.step.pairs["features"]
    # FCOS has P3..P7, Faster R-CNN P2..P6.
    assert [p.name for p in pairs] == ["p3~p3", "p4~p4", "p5~p5", "p6~p6"]
    assert [p.stride for p in pairs] == [8, 16, 32, 64]
    for pair in pairs:
        assert pair.student.shape == pair.teacher.shape
        assert pair.student.shape[:2] == (2, 48)  # the adapter maps 32 channels to the teacher's
        assert pair.student.requires_grad
        assert not pair.teacher.requires_grad
    assert pairs[0].image_sizes.tolist() == [[96.0, 80.0], [64.0, 96.0]]
    assert looking.step.targets.image_sizes == [(96, 80), (64, 96)]
    assert [len(boxes) for boxes in looking.step.targets.boxes] == [2, 2]
    assert [x.tolist() for x in looking.step.targets.classes] == [[0, 1], [0, 1]]
    assert set(losses) >= {"loss_kd_looking_part"}


def test_a_pyramid_may_be_one_map_per_call(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("towers", "head.cls_subnet", "head.cls_subnet")
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec)
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    assert [p.stride for p in looking.step.pairs["towers"]] == [8, 16, 32, 64, 128]


def test_one_level_of_a_many_call_module(tiny_student: Student, tiny_teacher: MakeTeacher) -> None:
    spec = CaptureSpec("towers", "head.cls_subnet@2", "head.cls_subnet")
    model, _, _ = wired(tiny_student, tiny_teacher("fcos"), spec)
    (pair,) = model.active["Looking"].captures[0].pairs
    assert (pair.student, pair.teacher, pair.stride) == (0, 2, 32)


def test_probing_changes_nothing(tiny_student: Student, tiny_teacher: MakeTeacher) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"))
    student = build_model(student_cfg(cfg)).train()
    student.backbone.bottom_up.eval()  # a mode of its own, as frozen BatchNorm has
    teacher = build_teacher(cfg)
    before = copy.deepcopy([student.state_dict(), teacher.model.state_dict()])
    modes = {name: module.training for name, module in student.named_modules()}
    state = torch.get_rng_state()
    DistillationDetector(student=student, teacher=teacher, distillers={"FeatureLp": FeatureLp()})

    assert tiny_runs.equal_states(before, [student.state_dict(), teacher.model.state_dict()])
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    hooks = [m._forward_hooks for model in (student, teacher.model) for m in model.modules()]
    assert not any(hooks)


def test_reports_what_is_paired(
    tiny_student: Student, tiny_teacher: MakeTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build_model(tiny_student("fcos", tiny_teacher("retinanet")))
    assert "p3 (stride 8, 32 channels)" in caplog.text
    assert "p7 (stride 128, 48 channels)" in caplog.text
    assert "1x1" in caplog.text


def test_a_module_that_does_not_run_is_named(
    tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"))
    student = build_model(student_cfg(cfg))
    student.spare = nn.Conv2d(1, 1, 1)
    spec = CaptureSpec("features", "spare", "backbone")
    with pytest.raises(RuntimeError, match="module 'spare' runs 0 times"):
        DistillationDetector(
            student=student,
            teacher=build_teacher(cfg),
            distillers={"Looking": Looking([spec])},
        )


def test_resampling_pairs_other_grids(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    """A view of 3/4 has strides 10.7, 21.3, ...: no grid of the teacher's."""
    spec = CaptureSpec("features", "backbone", "backbone")
    view = View(4 / 3, "bilinear")
    with pytest.raises(ValueError, match=r"KD.RESAMPLE_LEVELS True"):
        wired(tiny_student, tiny_teacher("fcos"), spec, view=view)
    model, looking, cfg = wired(
        tiny_student, tiny_teacher("fcos"), spec, view=view, resample_levels=True
    )
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    pairs = looking.step.pairs["features"]
    assert [p.name for p in pairs] == ["p3~p3", "p4~p4", "p5~p5", "p6~p6", "p7~p7"]
    assert all(p.student.shape == p.teacher.shape for p in pairs)
    # 96 px seen as 72, padded to 96: 12 cells, of which the first 9 are what the teacher sees too.
    assert pairs[0].student.shape[-2:] == (9, 9)
    assert pairs[0].stride == pytest.approx(32 / 3, rel=0.01)


def test_predictions_of_the_teacher(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("predictions", None, "head", "predictions")
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec)
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    assert set(looking.step.teacher) == {"predictions"}
    assert not looking.step.pairs


def test_teacher_is_any_module() -> None:
    """The wrapper asks of a teacher no more than a forward pass on Detectron2's inputs."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 8, stride=8)

        def forward(self, inputs: list[dict[str, Any]]) -> Any:
            images = torch.stack([item["image"].float() for item in inputs])
            features = self.backbone(images)
            return {"loss_plain": features.square().mean()}

    teacher = Teacher(Plain())
    model = DistillationDetector(
        student=Plain(),
        teacher=teacher,
        distillers={"FeatureLp": FeatureLp()},
        schedules={"FeatureLp": lambda iteration: 1.0},
    )
    (pair,) = model.active["FeatureLp"].captures[0].pairs
    assert pair.stride == 8
    assert isinstance(model.active["FeatureLp"].adapters["features"][0], nn.Identity)


@pytest.mark.parametrize(
    "spec",
    [
        CaptureSpec("features", "backbone", None),
        CaptureSpec("predictions", "head", None, "predictions"),
        CaptureSpec("head", "head", "head", "module"),
    ],
)
def test_a_capture_that_makes_no_sense_is_refused(
    spec: CaptureSpec, tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        wired(tiny_student, tiny_teacher("fcos"), spec)


def test_masks_of_a_grid_are_computed_once_for_all_distillers(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"))
    spec = CaptureSpec("features", "backbone", "backbone")
    model = DistillationDetector(
        student=build_model(student_cfg(cfg)),
        teacher=build_teacher(cfg),
        distillers={"Looking": Looking([spec]), "Looking:again": Looking([spec])},
    )
    with torch.no_grad():
        steps = model.eval().observe(tiny_runs.batch_of(cfg, tiny_records)).steps
    for one, other in zip(
        steps["Looking"].pairs["features"], steps["Looking:again"].pairs["features"], strict=True
    ):
        assert one.valid() is other.valid()
        assert one.image_sizes is other.image_sizes


def test_boxes_are_asked_for_only_where_a_distiller_needs_them(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("features", "backbone", "backbone")
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec)
    batch = [{"image": item["image"]} for item in tiny_runs.batch_of(cfg, tiny_records)]
    assert model.eval().observe(batch).steps["Looking"].targets.boxes == []
    type(looking).needs_boxes = True
    try:
        with pytest.raises(ValueError, match="needs boxes, but the training data has none"):
            model.observe(batch)
    finally:
        type(looking).needs_boxes = False


def test_nothing_active_is_nothing_to_observe(tiny_student: Student) -> None:
    model = DistillationDetector(student=build_model(student_cfg(tiny_student("fcos"))))
    with pytest.raises(RuntimeError, match=r"No distiller is active \(KD.DISTILLERS\)"):
        model.observe([])


def test_config_default_captures(tiny_teacher: MakeTeacher) -> None:
    cfg = load_config(str(tiny_teacher("fcos").config_file))
    assert (cfg.KD.FEATURE_LP.STUDENT_CAPTURE, cfg.KD.FEATURE_LP.TEACHER_CAPTURE) == (
        "backbone",
        "backbone",
    )


def test_predictions_of_both_on_common_positions(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("predictions", "head", "head", "predictions", levels=2)
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec)
    model.train()
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    pairs = looking.step.predictions["predictions"]
    assert [pair.stride for pair in pairs] == [8, 16]
    for pair in pairs:
        assert pair.student.boxes.shape == pair.teacher.boxes.shape
        assert pair.student.boxes.requires_grad and not pair.teacher.boxes.requires_grad
    # What pulls are compared at: the head's raw outputs, of all levels.
    assert len(looking.step.features) == 3 * 5
    assert looking.step.loss_normalizer == pytest.approx(float(model.student.loss_normalizer))
    assert looking.step.normalizer(lambda: torch.zeros(())) == looking.step.loss_normalizer


def test_predictions_of_a_reduced_view_are_in_the_loaded_images_pixels(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("predictions", "head", "head", "predictions")
    view = View(2.0, "bilinear")
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec, view=view)
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    pairs = looking.step.predictions["predictions"]
    # Strides 8 to 128 of half the size lie on those of 16 to 256.
    assert [pair.stride for pair in pairs] == [16, 32, 64, 128]
    right = pairs[0].student.boxes[..., 2].detach()
    assert right.amax() > pairs[0].grid.width * 16 - 16


def test_a_module_of_the_teacher_is_handed_over_and_not_taken_in(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    features = CaptureSpec("features", "backbone", "backbone", levels=2)
    specs = [features, CaptureSpec("rest", None, "head", "module")]
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), *specs)
    names = [name for name, _ in model.named_parameters()] + list(model.state_dict())
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None and model.teacher is not None
    assert looking.step.modules["rest"].module is model.teacher.model.head
    assert len(looking.step.pairs["features"]) == 2
    assert [name for name, _ in model.named_parameters()] + list(model.state_dict()) == names
    assert not any("head" in name and not name.startswith("student") for name in names)


def test_a_pyramid_of_the_teacher_alone(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    spec = CaptureSpec("scores", None, "head.cls_score")
    model, looking, cfg = wired(tiny_student, tiny_teacher("fcos"), spec)
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert looking.step is not None
    assert [level.stride for level in looking.step.maps["scores"]] == [8, 16, 32, 64, 128]


def test_what_enters_an_activation(tiny_student: Student, tiny_teacher: MakeTeacher) -> None:
    spec = CaptureSpec("entry", "head.cls_subnet^0", "head.cls_subnet^0")
    model, _, _ = wired(tiny_student, tiny_teacher("fcos"), spec)
    (capture,) = model.active["Looking"].captures
    assert capture.student is not None
    assert capture.student.module == "head.cls_subnet.0"


def test_a_resting_distiller_costs_no_adapter(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"))
    model = DistillationDetector(
        student=build_model(student_cfg(cfg)),
        teacher=build_teacher(cfg),
        distillers={"FeatureLp": FeatureLp(), "FeatureLp:resting": FeatureLp()},
        schedules={"FeatureLp:resting": lambda iteration: 0.0},
    )
    ran: list[str] = []
    for name, active in model.active.items():
        active.adapters["features"][0].register_forward_hook(
            lambda *args, name=name: ran.append(name)
        )
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert ran == ["FeatureLp"]
    assert losses["loss_kd_feature_lp:resting_idle"] == 0
