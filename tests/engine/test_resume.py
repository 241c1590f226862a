"""Promise 5: the same seed gives the same run, and a resumed run is the uninterrupted one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from tiny_runs import TinyTeacher

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]

RUN = {
    "SOLVER.MAX_ITER": 6,
    "SOLVER.WARMUP_ITERS": 5,
    "SOLVER.STEPS": [4],
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "KD.FEATURE_LP.SCHEDULE.WARMUP_ITERS": 5,
    "INPUT.MIN_SIZE_TRAIN": [64, 72, 80],  # drawn at random
}


def final(cfg: CfgNode) -> Any:
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth")


@pytest.mark.parametrize(
    ("detector", "extra"),
    [
        ("fcos", {}),
        ("retinanet", {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED": True}),
        # Draws random numbers within the step; evaluates where it is interrupted.
        ("faster_rcnn", {"TEST.EVAL_PERIOD": 3, "DATASETS.TEST": [tiny_runs.DATA]}),
    ],
)
def test_resumed_equals_uninterrupted(
    tiny_student: Student, tiny_teacher: MakeTeacher, detector: str, extra: dict[str, Any]
) -> None:
    teacher = tiny_teacher("fcos")
    whole = tiny_student(detector, teacher, {**RUN, **extra}, name="whole")
    parts = tiny_student(detector, teacher, {**RUN, **extra}, name="parts")
    _, expected = tiny_runs.train(whole)
    _, first = tiny_runs.train(parts, until=3)
    torch.manual_seed(99)  # another process
    trainer, second = tiny_runs.train(parts, resume=True)

    assert trainer.start_iter == 3
    assert len(first.steps) == len(second.steps) == 3
    assert first.steps == expected.steps[:3]
    assert second.steps == expected.steps[3:]
    a, b = final(whole), final(parts)
    assert tiny_runs.equal_states(a["model"], b["model"])
    assert tiny_runs.equal_states(a["kd"], b["kd"])
    assert tiny_runs.equal_states(a["trainer"], b["trainer"])  # optimizer, schedules, random state
    if detector != "faster_rcnn":
        assert a["kd"]["loss_normalizer"][""] > 0
    weights = [step["kd/feature_lp/weight"] for step in expected.steps]
    assert weights == [pytest.approx(0.001 * i / 5) for i in range(6)]


def test_same_seed_same_run_other_seed_other_run(
    tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cfg = tiny_student("faster_rcnn", tiny_teacher("fcos"), {"SEED": seed}, name=name)
        runs.append(tiny_runs.train(cfg)[1].steps)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_lost_loss_normaliser_would_show(
    tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    """What the first test relies on: the resumed losses depend on the restored normaliser."""
    cfg = tiny_student("retinanet", tiny_teacher("fcos"), RUN)
    _, expected = tiny_runs.train(cfg, until=4)
    folder = Path(cfg.OUTPUT_DIR)
    path = folder / "model_0000002.pth"
    content = torch.load(path)
    content["kd"]["loss_normalizer"][""] = 100.0
    torch.save(content, path)
    _, resumed = tiny_runs.train(cfg, resume=True, until=4)
    assert resumed.steps[0]["loss_cls"] != expected.steps[3]["loss_cls"]


def test_a_finished_run_stays_finished(tiny_student: Student) -> None:
    cfg = tiny_student("fcos")
    trainer, _ = tiny_runs.train(cfg)
    again, more = tiny_runs.train(cfg, resume=True)
    assert again.start_iter == 3
    assert more.steps == []
    state = dict(again.model.student.state_dict())
    assert tiny_runs.equal_states(dict(trainer.model.student.state_dict()), state)
