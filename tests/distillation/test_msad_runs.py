"""MSAD in whole training runs: from yaml alone, interrupted, with other teachers and distillers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_msad
import tiny_runs
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import FPN, build_model
from tiny_msad import MakeAligned, msad_cfg
from tiny_runs import TinyTeacher

from kd_det.config import load_config, student_cfg
from kd_det.distillation import detector as detector_module
from kd_det.engine.main import main

Student = Callable[..., CfgNode]
LOSS = "loss_kd_aligned_pyramid"


def logged_keys(folder: Path) -> set[str]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return {key for line in lines for key in json.loads(line)}


@pytest.mark.parametrize("detector", list(tiny_runs.META))
def test_trains_teacher_and_student_from_yaml(
    tiny_data: dict[str, str], tmp_path: Path, detector: str
) -> None:
    """The absent teacher first, three steps each; then stock Detectron2 takes the student."""
    own = {**tiny_msad.teacher_keys(detector), "KD.DATASETS": [tiny_data]}
    config = tiny_runs.write_config(tmp_path / "teacher.yaml", detector, own, r50=True)
    keys = tiny_msad.msad_keys(detector, TinyTeacher(config, Path("auto")))
    keys |= {"KD.DATASETS": [tiny_data], "KD.TEACHER.CONFIG_FILE": "teacher.yaml"}
    student = tiny_runs.write_config(tmp_path / "student.yaml", detector, keys, r50=True)
    main(["--config-file", str(student)])

    branches = logged_keys(tmp_path / "teacher")
    losses = {key for key in branches if key.startswith("loss_")}
    plain = {key.rsplit("_", 1)[0] for key in losses}
    assert losses == {f"{key}_{branch}" for key in plain for branch in ("high", "low", "fused")}
    assert {LOSS, "kd/aligned_pyramid/weight"} | plain <= logged_keys(tmp_path / "student")
    found = {"mask_rcnn": "loss_mask", "keypoint_rcnn": "loss_keypoint"}
    assert found.get(detector, "total_loss") in {*plain, "total_loss"}
    for name in ("teacher", "student"):
        assert json.loads((tmp_path / name / "result.json").read_text())["iterations"] == 3

    stock = build_model(student_cfg(load_config(str(student))))
    state = stock.state_dict()
    content = torch.load(tmp_path / "student" / "model_final.pth")
    # No tensor of the teacher: neither under the student's, nor beside it.
    assert content["model"].keys() == state.keys()
    assert content["kd"]["adapters"] == {} and content["kd"]["distillers"] == {}
    momenta = content["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(momenta) == len(list(stock.parameters()))
    loaded = DetectionCheckpointer(stock).load(str(tmp_path / "student" / "model_final.pth"))
    assert loaded["iteration"] == 2
    assert tiny_runs.equal_states(dict(stock.state_dict()), dict(content["model"]))


@pytest.mark.parametrize("student", ["autoassign", "ddod", "reppoints", "fsaf"])
def test_detectors_that_cannot_be_aligned_learn_from_one_that_is(
    aligned_teacher: MakeAligned, tmp_path: Path, student: str
) -> None:
    levels = {f"MODEL.{student.upper()}.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]}
    keys = {"KD.INHERIT": [], "SOLVER.MAX_ITER": 2, **levels}
    _, recorder = tiny_runs.train(msad_cfg(tmp_path / "s.yaml", student, aligned_teacher(), **keys))
    assert [step[LOSS] > 0 for step in recorder.steps] == [True, True]


def test_both_stages_train_in_two_processes_of_which_one_has_no_boxes(tmp_path: Path) -> None:
    """(f): two views and three branches, no parameter without a gradient, no search for them."""
    data = tiny_runs.make_data(tmp_path / "data", images=2, name="half_empty")
    truth = json.loads(Path(data["json"]).read_text())
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] == 1]
    Path(data["json"]).write_text(json.dumps(truth))
    keys = {
        "KD.DATASETS": [data],
        "DATASETS.TRAIN": [data["name"]],
        # A batch is both images, one per process.
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    }
    own = {**tiny_msad.teacher_keys("fcos"), **keys, "MODEL.ALIGNED.SPLIT_BN": True}
    config = tiny_runs.write_config(tmp_path / "teacher.yaml", "fcos", own, r50=True)
    keys |= tiny_msad.msad_keys("fcos", TinyTeacher(config, Path("auto")))
    student = tiny_runs.write_config(tmp_path / "student.yaml", "fcos", keys, r50=True)
    tiny_runs.torchrun(student)
    for name in ("teacher", "student"):
        content = torch.load(tmp_path / name / "model_final.pth")
        assert content["iteration"] == 2
        model = build_model(student_cfg(load_config(str(tmp_path / f"{name}.yaml"))))
        momenta = content["trainer"]["_trainer"]["optimizer"]["state"]
        assert len(momenta) == len(list(model.parameters()))
        assert all(state["momentum_buffer"].isfinite().all() for state in momenta.values())


def test_evaluation_runs_the_student_on_the_reduced_view_alone(
    aligned_teacher: MakeAligned,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every backbone that runs at all is counted, with its pixels."""
    cfg = msad_cfg(tmp_path / "s.yaml", "fcos", aligned_teacher(), **{"SOLVER.MAX_ITER": 1})
    tiny_runs.train(cfg)
    sizes: list[tuple[int, ...]] = []
    forward = FPN.forward

    def counted(self: FPN, x: torch.Tensor) -> Any:
        sizes.append(tuple(x.shape))
        return forward(self, x)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a teacher was built")

    monkeypatch.setattr(FPN, "forward", counted)
    monkeypatch.setattr(detector_module, "build_teacher", refuse)
    words = ["DATASETS.TEST", f"('{tiny_data['name']}',)"]
    main(["--config-file", str(tmp_path / "s.yaml"), "--eval-only", *words])
    # Images of 80x96 and 96x64 pixels, halved, padded to multiples of 32.
    assert sizes == [(1, 3, 64, 64), (1, 3, 32, 64)] * 4


class TestRun:
    KEYS: ClassVar[dict[str, Any]] = {
        "SOLVER.MAX_ITER": 4,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "KD.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS": 3,
        "INPUT.MIN_SIZE_TRAIN": [64, 80],  # drawn at random
    }

    def test_resumed_equals_uninterrupted_and_never_inherits_again(
        self, aligned_teacher: MakeAligned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teacher = aligned_teacher("fcos", 2, {"MODEL.ALIGNED.SPLIT_BN": True})
        whole = msad_cfg(tmp_path / "whole.yaml", "fcos", teacher, **self.KEYS)
        parts = msad_cfg(tmp_path / "parts.yaml", "fcos", teacher, **self.KEYS)
        counts: list[int] = []
        inherit = detector_module.inherit

        def counted(*args: Any) -> Any:
            copied = inherit(*args)
            counts.append(len(copied))
            return copied

        monkeypatch.setattr(detector_module, "inherit", counted)
        trainer, expected = tiny_runs.train(whole)
        assert counts == [len(trainer.model.student.state_dict())]
        _, first = tiny_runs.train(parts, until=2)
        assert len(counts) == 2
        resumed, second = tiny_runs.train(parts, resume=True)
        assert len(counts) == 2 and resumed.start_iter == 2
        assert first.steps + second.steps == expected.steps
        weights = [step["kd/aligned_pyramid/weight"] for step in expected.steps]
        assert weights == [pytest.approx(0.6 * min(1, i / 3)) for i in range(4)]
        states = [dict(t.model.student.state_dict()) for t in (trainer, resumed)]
        assert tiny_runs.equal_states(*states)

    def test_teacher_stays_bit_identical(
        self, aligned_teacher: MakeAligned, tmp_path: Path
    ) -> None:
        teacher = aligned_teacher("fcos", 2, {"MODEL.ALIGNED.SPLIT_BN": True})
        cfg = msad_cfg(tmp_path / "s.yaml", "fcos", teacher)
        trainer, _ = tiny_runs.train(cfg)
        state = dict(trainer.model.teacher.model.state_dict())
        assert tiny_runs.equal_states(state, dict(torch.load(teacher.weights)["model"]))
        assert not any(p.requires_grad for p in trainer.model.teacher.model.parameters())
        assert not tiny_runs.equal_states(
            dict(trainer.model.student.state_dict()),
            dict(trainer.model.teacher.model.inheritable_state()),
        )


class TestOtherPairs:
    def losses(self, cfg: CfgNode, key: str) -> Any:
        trainer, recorder = tiny_runs.train(cfg)
        assert len(recorder.steps) == 3
        for step in recorder.steps:
            values = [value for name, value in step.items() if name.startswith(key)]
            assert values and all(0 < value < float("inf") for value in values)
        return trainer.model

    @pytest.mark.parametrize("loss", ["l1", "ssim", "cosine"])
    def test_student_of_another_width_gets_adapters(
        self, tiny_student: Student, aligned_teacher: MakeAligned, loss: str
    ) -> None:
        keys = tiny_msad.msad_keys("fcos", aligned_teacher())
        keys |= {"KD.INHERIT": [], "KD.ALIGNED_PYRAMID.LOSS": loss}
        model = self.losses(tiny_student("fcos", aligned_teacher(), keys), LOSS)
        shapes = [tuple(p.shape) for p in model.active.parameters()]
        assert shapes == [(48, 32, 1, 1)] * 5

    def test_ordinary_teacher(
        self, tiny_student: Student, tiny_teacher: Callable[[str], TinyTeacher]
    ) -> None:
        teacher = tiny_teacher("fcos")
        keys = tiny_msad.msad_keys("fcos", teacher)
        keys |= {"KD.INHERIT": [], "KD.ALIGNED_PYRAMID.TEACHER_CAPTURE": "backbone"}
        model = self.losses(tiny_student("fcos", teacher, keys), LOSS)
        pairs = model.active["AlignedPyramid"].captures[0].pairs
        assert [pair.name for pair in pairs] == [f"p{i}~p{i + 1}" for i in range(2, 7)]

    def test_ssim_to_the_fused_pyramid(
        self, tiny_student: Student, aligned_teacher: MakeAligned
    ) -> None:
        keys = tiny_msad.reduced_keys("fcos", aligned_teacher())
        keys |= {"KD.DISTILLERS": ["SSIM"], "KD.SSIM.TEACHER_CAPTURE": "fusion"}
        self.losses(tiny_student("fcos", aligned_teacher(), keys), "loss_kd_ssim")

    def test_pgd_on_the_reduced_view(
        self, tiny_student: Student, tiny_teacher: Callable[[str], TinyTeacher]
    ) -> None:
        keys = tiny_msad.reduced_keys("fcos", tiny_teacher("fcos"))
        keys |= {"KD.DISTILLERS": ["PGD"]}
        model = self.losses(tiny_student("fcos", tiny_teacher("fcos"), keys), "loss_kd_pgd")
        names = {w.spec.name: [p.stride for p in w.pairs] for w in model.active["PGD"].captures}
        paired = [strides for strides in names.values() if strides]
        assert paired and all(strides == [8, 16, 32, 64, 128] for strides in paired)


def test_student_learns_a_batch(
    aligned_teacher: MakeAligned, tiny_records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """(l): detection losses and the distance to the teacher fall on two images."""
    norm = {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.DEPTH": 18}
    cfg = msad_cfg(tmp_path / "s.yaml", "fcos", aligned_teacher("fcos", 2, norm), **norm)
    model = build_model(cfg)
    model.inherit_from_teacher()
    batch = tiny_runs.batch_of(cfg, tiny_records)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(15):
        losses, _ = tiny_runs.losses_at(model, batch, 10)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({key: value.item() for key, value in losses.items()})
    assert all(history[-1][key] < history[0][key] for key in (LOSS, "loss_fcos_cls"))
    assert sum(history[-1].values()) < 0.8 * sum(history[0].values())


@pytest.mark.slow
def test_overfitting_raises_the_students_ap_above_its_start(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """(l): from a teacher's half-learned low branch, on the images it is tested on."""
    shared = {
        "KD.DATASETS": [tiny_data],
        "DATASETS.TEST": [tiny_data["name"]],
        "INPUT.RANDOM_FLIP": "none",
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.DEPTH": 18,
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.IMS_PER_BATCH": 4,
    }
    own = {**tiny_msad.teacher_keys("fcos"), **shared, "SOLVER.MAX_ITER": 70}
    config = tiny_runs.write_config(tmp_path / "teacher.yaml", "fcos", own, r50=True)
    teacher = TinyTeacher(config, tmp_path / "teacher" / "model_final.pth")
    fused = main(["--config-file", str(config)])["bbox"]["AP50"]
    path = tmp_path / "student.yaml"
    keys = {**tiny_msad.msad_keys("fcos", teacher), **shared}
    keys |= {"SOLVER.MAX_ITER": 120, "SOLVER.STEPS": [90], "MODEL.FCOS.SCORE_THRESH_TEST": 0.05}
    tiny_runs.write_config(path, "fcos", keys, r50=True)
    start = main(["--config-file", str(path), "SOLVER.BASE_LR", "0.0", "SOLVER.MAX_ITER", "1"])
    student = main(["--config-file", str(path)])
    assert student["bbox"]["AP"] > start["bbox"]["AP"] > 0
    assert fused > 20
