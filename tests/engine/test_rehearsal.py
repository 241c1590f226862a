"""Mistakes are found before the first step, also where the teacher is absent."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rehearsals
import tiny_runs
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import load_config
from kd_det.engine import training_set
from kd_det.engine.main import main, prepare
from kd_det.engine.rehearsal import check_before_training, rehearse_run
from kd_det.engine.trainer import DistillationTrainer


@pytest.fixture(autouse=True)
def _data(tiny_data: dict[str, str]) -> None:
    """The training set is registered."""


@pytest.mark.parametrize(("_", "keys", "message"), rehearsals.MISTAKES, ids=lambda x: str(x)[:9])
def test_a_mistake_stops_before_the_absent_teacher_is_trained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    _: str,
    keys: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    path = rehearsals.write_pair(tmp_path, keys(tmp_path), {})
    monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
    begun = time.monotonic()
    with pytest.raises((KeyError, ValueError), match=rf"(?s){message}"):
        main(["--config-file", str(path)])
    assert time.monotonic() - begun < 60
    assert not list(tmp_path.rglob("*.pth"))


def test_the_teachers_own_test_set_is_checked(tmp_path: Path) -> None:
    path = rehearsals.write_pair(tmp_path, {}, rehearsals.MISTAKES[-1][1](tmp_path))
    with pytest.raises(ValueError, match=r"broken_test.*nan"):
        main(["--config-file", str(path)])


def test_a_present_teacher_does_not_hide_a_broken_test_set(
    tmp_path: Path,
    tiny_teacher: Callable[[str], tiny_runs.TinyTeacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = tiny_runs.distil_keys("fcos", tiny_teacher("fcos"))
    keys |= rehearsals.MISTAKES[-1][1](tmp_path)
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
    monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"broken_test.*nan"):
        main(["--config-file", str(path)])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.WEIGHTS": "/gone/weights.pth"}, r"/gone/weights\.pth does not exist"),
        ({"KD.INHERIT": ["hed.*"]}, r"hed\.\*"),
        ({"SOLVER.OPTIMIZER": "Adam"}, r"SOLVER.OPTIMIZER is 'Adam'"),
        ({"MODEL.FCOS.NUM_CLASSES": 1}, r"(NUM_CLASSES to 2 or more|predicts 1 classes)"),
        (
            {"MODEL.FCOS.NUM_CLASSES": 80, "DATASETS.TEST": [tiny_runs.DATA]},
            r"predicts 80 classes, but DATASETS\.TRAIN \[.*\] has 2, .*NUM_CLASSES to 2\.",
        ),
    ],
)
def test_what_a_student_does_at_its_start_is_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    path = rehearsals.write_pair(tmp_path, keys, {})
    monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
    with pytest.raises((OSError, ValueError), match=message):
        main(["--config-file", str(path)])


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    """Neither files, nor numbers drawn, nor a teacher's checkpoint to be taken for a real one."""
    path = rehearsals.write_pair(tmp_path, {"DATASETS.TEST": [tiny_runs.DATA]}, {})
    cfg = load_config(str(path))
    prepare(cfg)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    check_before_training(cfg, DistillationTrainer)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(file.name for file in files) == ["student.yaml", "teacher.yaml"]
    assert not KDCheckpointer(torch.nn.Linear(1, 1), cfg.OUTPUT_DIR).has_checkpoint()


def test_a_trainer_of_the_user_is_what_is_tried(tmp_path: Path) -> None:
    class Trainer(DistillationTrainer):
        @classmethod
        def build_model(cls, cfg: Any) -> Any:
            raise RuntimeError("my own model does not build")

    with pytest.raises(RuntimeError, match="my own model"):
        main(["--config-file", str(rehearsals.write_pair(tmp_path, {}, {}))], trainer=Trainer)


@pytest.mark.parametrize(
    ("kind", "change", "message"), rehearsals.MISFITS, ids=lambda x: str(x)[:9]
)
class TestATestSetThatDoesNotFit:
    @pytest.mark.parametrize("absent", [True, False])
    def test_is_found_before(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        change: Callable[[Any], Any],
        message: str,
        absent: bool,
    ) -> None:
        keys = rehearsals.odd_test_set(tmp_path, kind, change)
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
        if absent:  # of the teacher alone, which comes first
            path = rehearsals.write_pair(tmp_path, {}, keys)
        monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
        with pytest.raises(ValueError, match=message):
            main(["--config-file", str(path)])

    def test_is_the_matter_of_who_loads_and_evaluates(
        self, tmp_path: Path, kind: str, change: Callable[[Any], Any], message: str
    ) -> None:
        class Trainer(DistillationTrainer):
            @classmethod
            def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
                return super().build_test_loader(cfg, dataset_name)

            @classmethod
            def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
                return super().build_evaluator(cfg, dataset_name)

        keys = rehearsals.odd_test_set(tmp_path, kind, change)
        cfg = load_config(str(tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)))
        prepare(cfg)
        check_before_training(cfg, Trainer)
        with pytest.raises(ValueError, match=message):
            check_before_training(cfg, DistillationTrainer)


def test_proposals_have_no_classes(tmp_path: Path) -> None:
    kind, change, message = rehearsals.MISFITS[0]
    keys = rehearsals.odd_test_set(tmp_path, kind, change)
    path = tiny_runs.write_config(tmp_path / "run.yaml", "faster_rcnn", keys)
    cfg = load_config(str(path))
    prepare(cfg)
    with pytest.raises(ValueError, match=message):
        check_before_training(cfg, DistillationTrainer)
    cfg = load_config(str(path), ["MODEL.META_ARCHITECTURE", "ProposalNetwork"])
    prepare(cfg)
    check_before_training(cfg, DistillationTrainer)


@pytest.fixture
def own_set() -> Iterator[str]:
    """A test set registered in Detectron2's own way: records and classes, and no COCO file."""
    name = "registered_by_hand"
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(tiny_runs.DATA))
    classes = MetadataCatalog.get(tiny_runs.DATA).thing_classes
    MetadataCatalog.get(name).set(thing_classes=list(classes), evaluator_type="coco")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("absent", [True, False])
def test_a_test_set_without_a_coco_file_is_evaluated_after_its_rehearsal(
    tmp_path: Path,
    own_set: str,
    tiny_teacher: Callable[[str], tiny_runs.TinyTeacher],
    absent: bool,
) -> None:
    """Detectron2's evaluator writes that file; the rehearsal's goes with the rehearsal's folder."""
    tested = {"DATASETS.TEST": [own_set], "SOLVER.MAX_ITER": 1}
    if absent:
        path = rehearsals.write_pair(tmp_path, tested, tested)
    else:
        keys = {**tiny_runs.distil_keys("fcos", tiny_teacher("fcos")), **tested}
        path = tiny_runs.write_config(tmp_path / "student.yaml", "fcos", keys)
    rehearse_run(load_config(str(path)))
    assert not MetadataCatalog.get(own_set).get("json_file")
    assert "AP" in main(["--config-file", str(path)])["bbox"]


@pytest.mark.parametrize("absent", [True, False])
def test_a_student_does_not_replace_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: bool
) -> None:
    """As with two yaml files that both leave OUTPUT_DIR to Detectron2's default."""
    path = rehearsals.write_pair(tmp_path, {"OUTPUT_DIR": str(tmp_path / "teacher")}, {})
    if not absent:
        cfg = load_config(str(tmp_path / "teacher.yaml"))
        prepare(cfg)
        KDCheckpointer(DistillationTrainer.build_model(cfg), cfg.OUTPUT_DIR).save("model_final")
    before = [file.read_bytes() for file in tmp_path.rglob("*.pth")]
    monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"is the folder of the teacher's checkpoint .*OUTPUT_DIR"):
        main(["--config-file", str(path)])
    with pytest.raises(ValueError, match=r"is the folder of the teacher's checkpoint"):
        rehearse_run(load_config(str(path)))
    assert [file.read_bytes() for file in tmp_path.rglob("*.pth")] == before


def test_a_run_whose_teacher_is_gone_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rehearsals.write_pair(tmp_path, {"SOLVER.MAX_ITER": 1}, {"SOLVER.MAX_ITER": 1})
    main(["--config-file", str(path)])
    weights = tmp_path / "teacher" / "model_final.pth"
    content = weights.read_bytes()
    weights.unlink()
    arguments = ["--config-file", str(path), "--resume", "SOLVER.MAX_ITER", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
        with pytest.raises(ValueError, match=r"was taught by .*model_final\.pth is not there yet"):
            main(arguments)
    weights.write_bytes(content)
    main(arguments)


def test_a_distiller_that_needs_boxes_is_refused_data_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rehearsals.write_pair(tmp_path, {"KD.DISTILLERS": ["PGD"]}, {})
    load = training_set.load_training_set

    def without(cfg: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "annotations"} for record in load(cfg)]

    monkeypatch.setattr(training_set, "load_training_set", without)
    monkeypatch.setattr(DistillationTrainer, "train", lambda _: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"PGD needs boxes, but DATASETS\.TRAIN .* \(e\.g\. .*png"):
        main(["--config-file", str(path)])
