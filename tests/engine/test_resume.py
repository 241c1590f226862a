"""Promise 5: the same seed gives the same run, and a resumed run is the uninterrupted one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from tiny_runs import TinyTeacher

from kd_det.engine.main import evaluate

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


class TestStoppedAfterItsLastStep:
    """The period divides MAX_ITER, so the last step wrote a periodic checkpoint as well."""

    @pytest.fixture
    def cfg(self, tiny_student: Student, tiny_teacher: MakeTeacher) -> CfgNode:
        keys = {**RUN, "DATASETS.TEST": [tiny_runs.DATA], "SOLVER.MAX_ITER": 3}
        return tiny_student("fcos", tiny_teacher("fcos"), keys)

    @pytest.mark.parametrize("left", [None, b"", b"PK\x03\x04 half of it"])
    def test_it_gets_its_final_checkpoint_and_result(
        self, cfg: CfgNode, left: bytes | None
    ) -> None:
        tiny_runs.train(cfg)
        folder = Path(cfg.OUTPUT_DIR)
        expected = final(cfg)
        (folder / "model_final.pth").unlink()
        if left is not None:
            (folder / "model_final.pth").write_bytes(left)
        (folder / "last_checkpoint").write_text("model_0000002.pth")
        (folder / "result.json").unlink()
        torch.manual_seed(99)
        trainer, steps = tiny_runs.train(cfg, resume=True)
        assert trainer.start_iter == 3
        assert steps.steps == []
        found = final(cfg)
        assert found["iteration"] == expected["iteration"]
        for part in ("model", "kd", "trainer"):
            assert tiny_runs.equal_states(found[part], expected[part])
        assert (folder / "last_checkpoint").read_text() == "model_final.pth"
        assert (folder / "result.json").exists()

    def test_a_finished_run_is_evaluated_again_and_keeps_its_file_and_speed(
        self, cfg: CfgNode
    ) -> None:
        tiny_runs.train(cfg)
        folder = Path(cfg.OUTPUT_DIR)
        before = (folder / "model_final.pth").stat().st_mtime_ns
        speed = json.loads((folder / "result.json").read_text())["sec_per_step"]
        (folder / "inference" / "coco_instances_results.json").write_text("[{")
        tiny_runs.train(cfg, resume=True)
        assert (folder / "model_final.pth").stat().st_mtime_ns == before
        assert json.loads((folder / "result.json").read_text())["sec_per_step"] == speed > 0
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())


@pytest.mark.parametrize("tag", [b"", b"\xff\xfe", b"gone.pth", None])
def test_evaluation_does_not_need_the_tag(
    tiny_student: Student, tiny_teacher: MakeTeacher, tag: bytes | None
) -> None:
    keys = {**RUN, "DATASETS.TEST": [tiny_runs.DATA], "SOLVER.MAX_ITER": 1}
    cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
    trainer, _ = tiny_runs.train(cfg)
    file = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    file.unlink()
    if tag is not None:
        file.write_bytes(tag)
    metrics = evaluate(cfg, last=True)
    assert str(metrics) == str(trainer._last_eval_results)
