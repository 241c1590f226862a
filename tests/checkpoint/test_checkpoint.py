"""Checkpoints: plain for stock Detectron2, complete for resuming, never half loaded."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import tiny_runs
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import student_cfg
from kd_det.engine.main import evaluate

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]

pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")

PERIOD_1 = {"SOLVER.CHECKPOINT_PERIOD": 1}


@pytest.fixture
def finished(tiny_student: Student, tiny_teacher: MakeTeacher) -> tuple[CfgNode, Path]:
    """A run of 3 iterations with a checkpoint after each."""
    cfg = tiny_student("fcos", tiny_teacher("fcos"), PERIOD_1)
    tiny_runs.train(cfg)
    return cfg, Path(cfg.OUTPUT_DIR)


def tensors_in(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        return [tensor for item in content for tensor in tensors_in(item)]
    return []


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("detector", list(tiny_runs.META))
def test_stock_detectron2_loads_a_mid_run_checkpoint(
    tiny_student: Student, tiny_teacher: MakeTeacher, detector: str
) -> None:
    """Promise 2, for every architecture: no missing and no unexpected key, and the same tensors."""
    keys = {**PERIOD_1, "KD.INHERIT": []}
    cfg = tiny_student(detector, tiny_teacher("fcos"), keys)
    trainer, _ = tiny_runs.train(cfg, until=2)
    path = Path(cfg.OUTPUT_DIR) / "model_0000001.pth"
    model = build_model(student_cfg(cfg))

    class Listening(DetectionCheckpointer):
        def _load_model(self, checkpoint: Any) -> Any:
            self.incompatible = super()._load_model(checkpoint)
            return self.incompatible

    checkpointer = Listening(model)
    checkpointer.load(str(path))
    assert checkpointer.incompatible.missing_keys == []
    assert checkpointer.incompatible.unexpected_keys == []
    assert checkpointer.incompatible.incorrect_shapes == []
    state = dict(trainer.model.student.state_dict())
    assert tiny_runs.equal_states(dict(model.state_dict()), state)
    assert torch.load(path)["model"].keys() == model.state_dict().keys()


def test_no_tensor_of_the_teacher_is_in_the_file(
    finished: tuple[CfgNode, Path], tiny_teacher: MakeTeacher
) -> None:
    teacher = torch.load(tiny_teacher("fcos").weights)["model"].values()
    # Constants, such as biases of 0, are no evidence.
    teacher = [t for t in teacher if t.numel() > 1 and t.unique().numel() > 1]
    assert len(teacher) > 100
    for path in finished[1].glob("*.pth"):
        found = tensors_in(torch.load(path))
        assert len(found) > 100
        assert not any(
            a.shape == b.shape and torch.equal(a, b.to(a.dtype)) for a in found for b in teacher
        )


def test_what_sits_beside_the_student(
    finished: tuple[CfgNode, Path], tiny_teacher: MakeTeacher
) -> None:
    _, folder = finished
    content = torch.load(folder / "model_0000001.pth")  # the safe unpickler reads it
    assert set(content) == {"model", "trainer", "kd", "iteration"}
    assert content["iteration"] == content["trainer"]["iteration"] == 1
    kd = content["kd"]
    assert set(kd) == {
        "adapters",
        "auto_weights",
        "distillers",
        "loss_normalizer",
        "names",
        "teacher",
    }
    assert len(kd["adapters"]) == 5
    assert kd["teacher"]["weights"] == str(tiny_teacher("fcos").weights)
    assert kd["teacher"]["config_file"] == str(tiny_teacher("fcos").config_file)
    assert len(kd["teacher"]["sha256"]) == 64
    assert kd["loss_normalizer"].keys() == {""}
    assert kd["loss_normalizer"][""] not in (0, 100, 300)  # it has moved


def test_files_appear_whole(
    tiny_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while writing leaves the last good file and its tag."""
    model = build_model(tiny_student("fcos"))
    checkpointer = KDCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    good = (tmp_path / "model_0000001.pth").read_bytes()

    def crash(data: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match=r"model_0000001.pth could not .*disk full.*: \d+ bytes"):
        checkpointer.save("model_0000001")
    assert (tmp_path / "model_0000001.pth").read_bytes() == good
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert list(tmp_path.glob("*.part")) == []


def test_the_tag_appears_whole(
    tiny_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = KDCheckpointer(build_model(tiny_student("fcos")), str(tmp_path))
    checkpointer.save("model_0000001")
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        if target.name == "last_checkpoint":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="last_checkpoint could not be written"):
        checkpointer.save("model_0000002")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


class TestResume:
    def test_truncated_last_checkpoint_falls_back_loudly(
        self, finished: tuple[CfgNode, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        cfg, folder = finished
        truncate(folder / "model_final.pth")
        truncate(folder / "model_0000002.pth")
        trainer = tiny_runs.DistillationTrainer(cfg)
        with caplog.at_level(logging.WARNING):
            trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 2
        good = torch.load(folder / "model_0000001.pth")
        state = dict(trainer.model.student.state_dict())
        assert tiny_runs.equal_states(state, dict(good["model"]))
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        damaged = [message for message in warnings if "is damaged" in message]
        assert len(damaged) == 2
        assert "model_final.pth" in damaged[0]
        assert "model_0000002.pth" in damaged[1]
        assert "trying the one before it" in damaged[0]

    def test_a_lost_tag_is_no_lost_run(self, finished: tuple[CfgNode, Path]) -> None:
        cfg, folder = finished
        (folder / "last_checkpoint").write_text("")
        trainer = tiny_runs.DistillationTrainer(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 3

    def test_all_damaged_stops(self, finished: tuple[CfgNode, Path]) -> None:
        cfg, folder = finished
        for path in folder.glob("*.pth"):
            path.write_bytes(b"")
        trainer = tiny_runs.DistillationTrainer(cfg)
        before = {k: v.clone() for k, v in trainer.model.student.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"None of the checkpoints.*is readable") as error:
            trainer.resume_or_load(resume=True)
        assert "model_final.pth" in str(error.value)
        assert "start afresh without --resume" in str(error.value)
        assert tiny_runs.equal_states(before, dict(trainer.model.student.state_dict()))

    def test_another_teacher_stops(
        self, finished: tuple[CfgNode, Path], tiny_student: Student, tmp_path: Path
    ) -> None:
        cfg, folder = finished
        other = tiny_runs.make_teacher(tmp_path / "other", "fcos")
        content = torch.load(other.weights)
        content["model"]["head.ctrness.bias"] += 1
        torch.save(content, other.weights)
        changed = tiny_student("fcos", other, {**PERIOD_1, "OUTPUT_DIR": str(folder)}, name="new")
        trainer = tiny_runs.DistillationTrainer(changed)
        with pytest.raises(ValueError, match=r"was taught by .*sha256") as error:
            trainer.resume_or_load(resume=True)
        assert str(other.weights) in str(error.value)
        assert str(cfg.KD.TEACHER.WEIGHTS) in str(error.value)
        assert "Resume with the same teacher" in str(error.value)

    def test_same_teacher_at_another_path_goes_on(
        self, finished: tuple[CfgNode, Path], tiny_student: Student, tmp_path: Path
    ) -> None:
        cfg, folder = finished
        moved = tmp_path / "moved.pth"
        moved.write_bytes(Path(cfg.KD.TEACHER.WEIGHTS).read_bytes())
        teacher = TinyTeacher(Path(cfg.KD.TEACHER.CONFIG_FILE), moved)
        changed = tiny_student("fcos", teacher, {"OUTPUT_DIR": str(folder)}, name="new")
        trainer = tiny_runs.DistillationTrainer(changed)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 3

    def test_other_distillers_stop(
        self, finished: tuple[CfgNode, Path], tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        """Here by one that has no tensors of its own, whose adapters are there too."""
        keys = {"OUTPUT_DIR": str(finished[1]), "KD.DISTILLERS": ["SSIM", "PKD"]}
        trainer = tiny_runs.DistillationTrainer(
            tiny_student("fcos", tiny_teacher("fcos"), keys, name="new")
        )
        message = r"had the distillers FeatureLp, this config has PKD, SSIM\. Resume with the same"
        with pytest.raises(ValueError, match=message):
            trainer.resume_or_load(resume=True)

    def test_a_weight_that_was_given_is_measured_if_it_is_no_more(
        self,
        finished: tuple[CfgNode, Path],
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        keys = {"OUTPUT_DIR": str(finished[1]), "KD.FEATURE_LP.WEIGHT": None}
        trainer = tiny_runs.DistillationTrainer(
            tiny_student("fcos", tiny_teacher("fcos"), keys, name="new")
        )
        with caplog.at_level(logging.INFO):
            trainer.resume_or_load(resume=True)
        assert "FeatureLp: its weight was given before, and is measured from here" in caplog.text

    def test_a_stock_checkpoint_is_not_resumed(self, tiny_student: Student) -> None:
        cfg = tiny_student("fcos")
        Path(cfg.OUTPUT_DIR).mkdir()
        stock = DefaultTrainer(student_cfg(cfg))
        stock.checkpointer.save("model_0000001", iteration=1)
        trainer = tiny_runs.DistillationTrainer(cfg)
        with pytest.raises(ValueError, match=r"has no kd, so it is no checkpoint of a kd_det run"):
            trainer.resume_or_load(resume=True)

    def test_another_student_stops(
        self, finished: tuple[CfgNode, Path], tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        keys = {"OUTPUT_DIR": str(finished[1]), "MODEL.FCOS.NUM_CLASSES": 3}
        trainer = tiny_runs.DistillationTrainer(
            tiny_student("fcos", tiny_teacher("fcos"), keys, name="new")
        )
        with pytest.raises(ValueError, match=r"does not fit the student \(head.cls_score"):
            trainer.resume_or_load(resume=True)

    def test_nothing_there_is_a_fresh_start(self, tiny_student: Student) -> None:
        trainer = tiny_runs.DistillationTrainer(tiny_student("fcos"))
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 0


class TestStudentWeights:
    @pytest.fixture
    def model(self, tiny_student: Student) -> torch.nn.Module:
        return torch.nn.Module.eval(build_model(tiny_student("fcos", name="fresh")))

    def loaded(self, model: torch.nn.Module, path: Path) -> bool:
        KDCheckpointer(model).load_student(str(path), strict=True)
        expected = dict(torch.load(path)["model"])
        return tiny_runs.equal_states(dict(model.student.state_dict()), expected)

    def test_mid_run_final_and_stock(
        self,
        finished: tuple[CfgNode, Path],
        model: torch.nn.Module,
        tiny_student: Student,
        tmp_path: Path,
    ) -> None:
        stock = tiny_runs.save_random_weights(tiny_student("fcos"), tmp_path / "stock.pth")
        for path in (finished[1] / "model_0000000.pth", finished[1] / "model_final.pth", stock):
            assert self.loaded(model, path)

    def test_missing_file(self, model: torch.nn.Module) -> None:
        with pytest.raises(FileNotFoundError, match=r"MODEL.WEIGHTS: /nowhere.pth does not exist"):
            self.loaded(model, Path("/nowhere.pth"))

    def test_similar_names_are_matched_on_request(
        self, model: torch.nn.Module, tmp_path: Path
    ) -> None:
        """As ViTDet's configs do: published backbones do not know their place in a detector."""
        own = model.student.state_dict()
        inner = "backbone.bottom_up."
        published = {k.removeprefix(inner): v + 1 for k, v in own.items() if k.startswith(inner)}
        torch.save({"model": published}, tmp_path / "net.pth")
        checkpointer = KDCheckpointer(model)
        checkpointer.load_student(f"{tmp_path}/net.pth?matching_heuristics=True", strict=False)
        now = model.student.state_dict()
        assert all(torch.equal(now[inner + k], v) for k, v in published.items())
        # Any other question is part of the address, as in signed URLs.
        with pytest.raises(FileNotFoundError, match=r"net\.pth\?key=1 does not exist"):
            checkpointer.load_student(f"{tmp_path}/net.pth?key=1", strict=False)

    def test_damaged_file(self, model: torch.nn.Module, tmp_path: Path) -> None:
        (tmp_path / "half.pth").write_bytes(b"PK\x03\x04")
        with pytest.raises(ValueError, match=r"half.pth could not be read .*complete checkpoint"):
            self.loaded(model, tmp_path / "half.pth")

    def test_other_architecture(self, model: torch.nn.Module, tiny_teacher: MakeTeacher) -> None:
        path = tiny_teacher("fcos").weights  # R50 instead of R18
        with pytest.raises(ValueError, match=r"holds \d+ of the student's \d+ tensors") as error:
            self.loaded(model, path)
        assert "Give a checkpoint of this architecture" in str(error.value)

    def test_a_backbone_alone_is_a_fine_start_but_nothing_to_evaluate(
        self, model: torch.nn.Module, tmp_path: Path
    ) -> None:
        state = model.student.state_dict()
        backbone = {k: v + 1 for k, v in state.items() if k.startswith("backbone.")}
        torch.save({"model": backbone}, tmp_path / "backbone.pth")
        checkpointer = KDCheckpointer(model)
        checkpointer.load_student(str(tmp_path / "backbone.pth"), strict=False)
        now = model.student.state_dict()
        assert all(torch.equal(now[k], v) for k, v in backbone.items())
        with pytest.raises(ValueError, match=r"missing or of another shape: head\."):
            checkpointer.load_student(str(tmp_path / "backbone.pth"), strict=True)

    def test_evaluation_without_any_checkpoint(self, tiny_student: Student) -> None:
        with pytest.raises(FileNotFoundError, match=r"Nothing to evaluate: MODEL.WEIGHTS is empty"):
            evaluate(tiny_student("fcos"), last=False)


def test_a_flipped_byte_is_found_and_passed_over(
    tiny_student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny_student("fcos"))
    checkpointer = KDCheckpointer(model, str(tmp_path))
    for name in ("model_0000001", "model_0000002"):
        checkpointer.save(name)
    last = tmp_path / "model_0000002.pth"
    weight = next(iter(checkpointer.model.state_dict().values())).numpy().tobytes()
    content = bytearray(last.read_bytes())
    at = content.find(weight)
    assert at > 0
    content[at + 2] ^= 1
    last.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        assert checkpointer.last_readable() == str(tmp_path / "model_0000001.pth")
    assert "model_0000002.pth is damaged" in caplog.text and "checksum" in caplog.text
    with pytest.raises(ValueError, match=r"model_0000002\.pth is damaged: .* its checksum"):
        checkpointer.load_student(str(last), strict=True)
