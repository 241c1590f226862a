"""Whole runs of the published methods with tiny detectors, and what each of them refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher

from kd_det.config import student_cfg

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]

RUN = {"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 2, "INPUT.MIN_SIZE_TRAIN": [0]}
# Method, student, teacher, keys, loss parts.
RUNS: list[tuple[str, str, str, dict[str, Any], list[str]]] = [
    ("PKD", "fcos", "retinanet", {}, [""]),
    ("PKD", "faster_rcnn", "fcos", {}, [""]),
    ("CWD", "fcos", "faster_rcnn", {}, [""]),
    ("CWD", "gfl", "gfl", {"FEATURES": "logits"}, [""]),
    ("FRS", "fcos", "fcos", {"SCHEDULE.WARMUP_ITERS": 0}, ["_feat", "_head"]),
    ("FRS", "faster_rcnn", "retinanet", {"BETA": 0.0, "SCHEDULE.WARMUP_ITERS": 0}, ["_feat"]),
    (
        "FRS",
        "faster_rcnn",
        "faster_rcnn",
        {"SCORES_CAPTURE": "proposal_generator.rpn_head.objectness_logits"},
        ["_feat", "_head"],
    ),
    ("BCKD", "gfl", "gfl", {}, ["_cls", "_loc"]),
    ("BCKD", "retinanet", "retinanet", {}, ["_cls", "_loc"]),
    # Detectors whose assignment follows their predictions.
    ("PGD", "autoassign", "autoassign", {"TAU": 0.4}, ["_cls", "_reg"]),
    ("BCKD", "autoassign", "fsaf", {}, ["_cls", "_loc"]),
    ("CROSSKD", "fsaf", "autoassign", {"REUSE_FROM": 1}, ["_cls", "_reg"]),
    # Students of other classes and assignments; one without a dense head.
    ("CROSSKD", "gfl", "gfl", {"REUSE_FROM": 1}, ["_cls", "_reg"]),
    ("CROSSKD", "fcos", "retinanet", {"REUSE_FROM": 1}, ["_cls", "_reg"]),
    ("CROSSKD", "faster_rcnn", "atss", {"REUSE_FROM": 0}, ["_cls", "_reg"]),
    (
        "CROSSKD",
        "atss",
        "atss",
        {"REUSE_FROM": 1, "QUALITY_WEIGHT": 1.0},
        ["_cls", "_reg", "_quality"],
    ),
    ("CROSSKD", "reppoints", "ddod", {"REUSE_FROM": 1, "BOX": "giou"}, ["_cls", "_reg"]),
    ("MGD", "faster_rcnn", "fcos", {}, [""]),
    ("FGD", "fcos", "faster_rcnn", {}, ["_fg", "_bg", "_attention", "_global"]),
    ("LD", "gfl", "gfl", {}, ["_main", "_vlr", "_kd"]),
]
# Registered names that are not their node's.
NAMES = {"CROSSKD": "CrossKD"}


def keys_of(method: str, keys: dict[str, Any]) -> dict[str, Any]:
    weight = {f"KD.{method}.WEIGHT": 0.001, f"KD.{method}.SCHEDULE.DECAY": "constant"}
    own = {f"KD.{method}.{key}": value for key, value in keys.items()}
    return {"KD.DISTILLERS": [NAMES.get(method, method)], **weight, **own}


@pytest.mark.parametrize(("method", "student", "teacher", "keys", "parts"), RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_and_ships_a_plain_student(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    method: str,
    student: str,
    teacher: str,
    keys: dict[str, Any],
    parts: list[str],
) -> None:
    settings = {**RUN, **keys_of(method, keys)}
    whole = tiny_student(student, tiny_teacher(teacher), settings, name="whole")
    split = tiny_student(student, tiny_teacher(teacher), settings, name="parts")
    _, expected = tiny_runs.train(whole)
    tiny_runs.train(split, until=2)
    torch.manual_seed(99)  # another process
    _, resumed = tiny_runs.train(split, resume=True)

    last = expected.steps[-1]
    assert {f"loss_kd_{method.lower()}{part}" for part in parts} <= set(last)
    assert all(last[f"loss_kd_{method.lower()}{part}"] > 0 for part in parts if part != "_global")
    assert resumed.steps == expected.steps[2:]
    a, b = (torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth") for cfg in (whole, split))
    assert tiny_runs.equal_states(a["model"], b["model"])
    assert tiny_runs.equal_states(a["kd"], b["kd"])
    assert set(a["model"]) == set(build_model(student_cfg(whole)).state_dict())


@pytest.mark.parametrize(("student", "teacher"), [("autoassign", "fsaf"), ("gfl", "gfl")])
def test_scores_of_another_kind_of_detector_are_told(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    student: str,
    teacher: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build_model(tiny_student(student, tiny_teacher(teacher), keys_of("BCKD", {})))
    told = (
        "BCKD compares class scores of a student AutoAssign with those of a teacher FSAF"
        in caplog.text
    )
    assert told == (student != teacher)


@pytest.mark.parametrize(("method", "student", "teacher", "keys", "parts"), RUNS)
@pytest.mark.parametrize("active", [True, False])
def test_every_parameter_has_a_gradient_and_the_teacher_none(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    tiny_records: list[dict[str, Any]],
    method: str,
    student: str,
    teacher: str,
    keys: dict[str, Any],
    parts: list[str],
    active: bool,
) -> None:
    """Several processes would wait for a parameter without one."""
    settings = keys_of(method, {**keys, "SCHEDULE.STOP_AT": -1 if active else 0})
    cfg = tiny_student(student, tiny_teacher(teacher), settings)
    model = build_model(cfg)
    before = [x.clone() for x in model.teacher.model.state_dict().values()]
    names = {name for name, _ in model.named_parameters()}
    assert not any("teacher" in name and "distiller" not in name for name in names)
    # Warm-up leaves the first iteration without distillation.
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), iteration=1)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    after = list(model.teacher.model.state_dict().values())
    assert tiny_runs.equal_states(before, after)
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize(("method", "student", "teacher", "keys", "parts"), RUNS)
def test_its_weight_sets_itself_by_default(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    tiny_records: list[dict[str, Any]],
    method: str,
    student: str,
    teacher: str,
    keys: dict[str, Any],
    parts: list[str],
) -> None:
    """The pull is measured where the loss touches the student: pyramids, towers, raw outputs."""
    settings = keys_of(method, {**keys, "SCHEDULE.WARMUP_ITERS": 0})
    settings.pop(f"KD.{method}.WEIGHT")
    model = build_model(cfg := tiny_student(student, tiny_teacher(teacher), settings))
    batch = tiny_runs.batch_of(cfg, tiny_records)
    losses, storage = tiny_runs.losses_at(model, batch)
    weight, _ = storage.latest()[f"kd/{method.lower()}/weight"]
    assert 1e-9 < weight < 1e6
    assert all(losses[f"loss_kd_{method.lower()}{part}"].isfinite() for part in parts)


def refuse(cfg: CfgNode, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build_model(cfg)


class TestRefusals:
    """At build time, naming the remedy."""

    def test_sides_that_are_no_distributions(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        cfg = tiny_student("gfl", tiny_teacher("atss"), keys_of("LD", {}))
        refuse(cfg, ValueError, r"bins per side of a box are 17 and 0; both must be detectors like")
        other = {**keys_of("LD", {}), "MODEL.GFL.REG_MAX": 8}
        cfg = tiny_student("gfl", tiny_teacher("gfl"), other)
        refuse(cfg, ValueError, r"are 9 and 17; .*the same MODEL.GFL.REG_MAX")

    def test_heads_and_towers_that_crosskd_cannot_use(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        own = keys_of("CROSSKD", {"REUSE_FROM": 0, "HEAD": "roi_heads"})
        cfg = tiny_student("fcos", tiny_teacher("faster_rcnn"), own)
        refuse(cfg, TypeError, "Nothing decodes the dense predictions of GeneralizedRCNN")
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys_of("CROSSKD", {}))
        refuse(cfg, ValueError, r"'head.cls_subnet\^2': .*REUSE_FROM is 3: .*Take fewer, or 0")
        cfg = tiny_student("faster_rcnn", tiny_teacher("fcos"), keys_of("CROSSKD", {}))
        refuse(cfg, ValueError, r"no module 'head.cls_subnet'; .*REUSE_FROM is 3: .*or 0")
        narrow = keys_of("CROSSKD", {"REUSE_FROM": 1, "ADAPTER": "never"})
        cfg = tiny_student("fcos", tiny_teacher("fcos"), narrow)
        refuse(cfg, ValueError, r"have 32 and 48 channels and adapters are off\. Set .*ADAPTER")
        cfg = tiny_student("gfl", tiny_teacher("reppoints"), keys_of("CROSSKD", {"REUSE_FROM": 1}))
        refuse(cfg, ValueError, r"\(RepPointsHead\) do not follow from what its towers give")

    def test_predictions_of_other_anchors(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        cfg = tiny_student("fcos", tiny_teacher("retinanet"), keys_of("BCKD", {}))
        refuse(cfg, ValueError, r"are 0.5 and 0.0; set MODEL.ANCHOR_GENERATOR.OFFSET of both")
        moved = {**keys_of("BCKD", {}), "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5}
        cfg = tiny_student("retinanet", tiny_teacher("gfl"), keys_of("BCKD", {}))
        refuse(cfg, ValueError, r"anchors per position are 9 and 1; take a teacher")
        wide = {**keys_of("BCKD", {}), "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.4, 1.0, 2.5]]}
        cfg = tiny_student("retinanet", tiny_teacher("retinanet"), wide)
        refuse(cfg, ValueError, r"anchors at stride 8 are .*give both the same")
        build_model(tiny_student("atss", tiny_teacher("fcos"), moved))

    def test_a_student_without_dense_predictions(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        cfg = tiny_student("faster_rcnn", tiny_teacher("fcos"), keys_of("BCKD", {}))
        refuse(cfg, TypeError, "Nothing decodes the dense predictions of GeneralizedRCNN")

    @pytest.mark.parametrize(
        ("method", "keys", "detector"),
        [
            ("BCKD", {}, "fcos"),
            ("CWD", {"FEATURES": "logits"}, "fcos"),
            ("FRS", {}, "fcos"),
            ("LD", {}, "gfl"),
        ],
    )
    def test_other_classes(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        method: str,
        keys: dict[str, Any],
        detector: str,
    ) -> None:
        settings = {**keys_of(method, keys), f"MODEL.{detector.upper()}.NUM_CLASSES": 3}
        cfg = tiny_student(detector, tiny_teacher(detector), settings)
        refuse(cfg, ValueError, "The student predicts 3 classes, the teacher 2")

    def test_class_logits_of_other_anchors(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        settings = keys_of("CWD", {"FEATURES": "logits"})
        cfg = tiny_student("fcos", tiny_teacher("retinanet"), settings)
        refuse(cfg, ValueError, r"2 and 18 channels and adapters are off\. .*or FEATURES 'neck'")
        cfg = tiny_student("fcos", tiny_teacher("retinanet"), keys_of("FRS", {}))
        refuse(cfg, ValueError, r"2 and 18 channels and adapters are off\. .*KD.FRS.BETA 0")
