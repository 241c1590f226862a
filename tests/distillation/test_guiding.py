"""A student assigned by its teacher's predictions: whole steps, resuming, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from tiny_runs import TinyTeacher
from torch import Tensor

from kd_det.config import student_cfg
from kd_det.distillers.predictions import decoder_of

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]

# Fresh heads all predict their anchors: what differs between two is where the classes are likely.
BY_CLASS = {"MODEL.DDOD.ASSIGNER": "topk", "MODEL.DDOD.REG_IOU_EXPONENT": 0.0}
PGD = {"KD.DISTILLERS": ["PGD"], "KD.PGD.WEIGHT": 0.001, **BY_CLASS}
GUIDED = {**PGD, "KD.PGD.ASSIGN_FROM_TEACHER": True}
LOSSES = {"loss_ddod_cls", "loss_ddod_loc", "loss_ddod_quality", "loss_kd_pgd_cls"}


def losses_of(cfg: CfgNode, records: Any, iteration: int = 0) -> dict[str, Tensor]:
    seed_all_rng(1)
    losses, _ = tiny_runs.losses_at(build_model(cfg), tiny_runs.batch_of(cfg, records), iteration)
    return losses


def test_the_students_objects_go_where_the_teacher_predicts_them(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Any
) -> None:
    teacher = tiny_teacher("ddod")
    cfg = tiny_student("ddod", teacher, GUIDED)
    batch = tiny_runs.batch_of(cfg, tiny_records)
    seed_all_rng(1)
    model = build_model(cfg)
    losses, _ = tiny_runs.losses_at(model, batch)
    assert set(losses) >= LOSSES

    # The same by hand: the teacher's head, and the plain student told to assign by it.
    seed_all_rng(1)
    plain = build_model(student_cfg(cfg))
    frozen = model.teacher.model
    with torch.no_grad():
        images = frozen.preprocess_image(batch)
        levels = frozen.backbone(images.tensor)
        outputs = frozen.head([levels[name] for name in frozen.head_in_features])
    with plain.assigning_by(decoder_of(frozen)(outputs)):
        expected, _ = tiny_runs.losses_at(plain, batch)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert torch.equal(model.student.level_counts, plain.level_counts)
    seed_all_rng(1)
    own, _ = tiny_runs.losses_at(build_model(student_cfg(cfg)), batch)
    assert own["loss_ddod_loc"] != expected["loss_ddod_loc"]


def test_while_the_weight_is_0_it_assigns_by_itself(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Any
) -> None:
    teacher = tiny_teacher("ddod")
    warm = {"KD.PGD.SCHEDULE.WARMUP_ITERS": 4}
    guided, alone = (
        tiny_student("ddod", teacher, {**keys, **warm}, name=name)
        for name, keys in (("guided", GUIDED), ("alone", PGD))
    )
    for iteration, same in ((0, True), (2, False)):
        a, b = (losses_of(cfg, tiny_records, iteration) for cfg in (guided, alone))
        assert (a["loss_ddod_loc"] == b["loss_ddod_loc"]) == same


def test_strides_are_compared_in_the_pixels_of_the_students_own_view(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Any
) -> None:
    """Its P3 to P6 lie on the grids of the teacher's P4 to P7."""
    levels = ["p3", "p4", "p5", "p6"]
    keys = {**GUIDED, "KD.STUDENT.VIEW_FACTOR": 2.0, "MODEL.DDOD.IN_FEATURES": levels}
    with pytest.raises(ValueError, match=r"strides \[4.0, 8.0, 16.0, 32.0, 64.0\] instead of"):
        build_model(tiny_student("ddod", tiny_teacher("ddod"), keys))


def test_resuming_goes_on_with_the_counts(tiny_student: Student, tiny_teacher: MakeTeacher) -> None:
    settings = {**GUIDED, "SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 2}
    whole = tiny_student("ddod", tiny_teacher("ddod"), settings, name="whole")
    split = tiny_student("ddod", tiny_teacher("ddod"), settings, name="parts")
    trainer, expected = tiny_runs.train(whole)
    tiny_runs.train(split, until=2)
    torch.manual_seed(99)  # another process
    again, resumed = tiny_runs.train(split, resume=True)
    assert resumed.steps == expected.steps[2:]
    counts = trainer.model.student.level_counts
    assert counts.sum() > 0 and torch.equal(again.model.student.level_counts, counts)

    content = torch.load(Path(whole.OUTPUT_DIR) / "model_final.pth")
    assert torch.equal(content["kd"]["running_buffers"]["level_counts"], counts)
    assert set(content["model"]) == set(build_model(student_cfg(whole)).state_dict())


@pytest.mark.parametrize(
    ("student", "teacher", "keys", "error", "message"),
    [
        ("gfl", "ddod", {}, TypeError, "assignment of GFL reads none; DDOD's does"),
        ("ddod", "fcos", {}, ValueError, r"offset of positions 0.5 instead of 0.0"),
        (
            *("ddod", "ddod"),
            {
                "KD.DISTILLERS": ["PGD", "PGD:b"],
                "KD.PGD:b.ASSIGN_FROM_TEACHER": True,
                "KD.PGD:b.WEIGHT": 1.0,
            },
            *(ValueError, "PGD and PGD:b both want"),
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_built(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    student: str,
    teacher: str,
    keys: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        build_model(tiny_student(student, tiny_teacher(teacher), {**GUIDED, **keys}))
