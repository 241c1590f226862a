"""train_net.py end to end: the absent teacher first, training, evaluation, the files left."""

import json
import logging
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import TinyTeacher

from kd_det.distillation import detector as detector_module
from kd_det.engine.main import main
from kd_det.reading import RefusedFileError

MakeTeacher = Callable[[str], TinyTeacher]
EVALUATED = {"DATASETS.TEST": [tiny_runs.DATA]}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def auto(tiny_data: dict[str, str], tmp_path: Path) -> tuple[Path, Path]:
    """Configs of a teacher that is not trained yet, and of its student."""
    own = {**EVALUATED, "KD.DATASETS": [tiny_data], "SOLVER.MAX_ITER": 2}
    teacher = tiny_runs.write_config(tmp_path / "teacher.yaml", "fcos", own, r50=True)
    keys = {
        **tiny_runs.distil_keys("fcos", TinyTeacher(Path("teacher.yaml"), Path("auto"))),
        **EVALUATED,
        "KD.DATASETS": [tiny_data],
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    return teacher, tiny_runs.write_config(tmp_path / "student.yaml", "fcos", keys)


def test_trains_the_absent_teacher_first_and_once(
    auto: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, student = auto
    metrics = main(["--config-file", str(student)])
    weights = tmp_path / "teacher" / "model_final.pth"
    assert set(metrics["bbox"]) >= {"AP", "AP50", "AP75"}
    log = (tmp_path / "student" / "log.txt").read_text()
    assert f"The teacher's checkpoint {weights} is not there yet: training it first." in log
    assert "now the student" in log
    assert "Paired pyramid levels" in log
    taught = torch.load(tmp_path / "student" / "model_final.pth")["kd"]["teacher"]
    assert taught["weights"] == str(weights)

    result = read(tmp_path / "student" / "result.json")
    assert result["metrics"]["bbox"].keys() == metrics["bbox"].keys()
    assert result["iterations"] == 3
    assert result["seed"] == 7
    assert result["sec_per_step"] > 0
    assert result["peak_memory_mb"] > 1
    assert read(tmp_path / "teacher" / "result.json")["iterations"] == 2
    progress = read(tmp_path / "student" / "progress.json")
    assert progress == {"iteration": 3, "max_iter": 3, "phase": "done", "eta_seconds": 0.0}
    lines = (tmp_path / "student" / "metrics.json").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"loss_kd_feature_lp", "kd/feature_lp/weight", "bbox/AP"} <= logged
    assert list((tmp_path / "student").glob("events.out.tfevents.*"))

    # Again: the teacher is kept, the finished student is not trained on.
    before = weights.stat().st_mtime_ns
    main(["--config-file", str(student), "--resume"])
    assert weights.stat().st_mtime_ns == before
    assert read(tmp_path / "student" / "progress.json") == progress


def test_an_interrupted_teacher_is_resumed(auto: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = auto
    cfg = tiny_runs.load_config(str(teacher), ["SOLVER.CHECKPOINT_PERIOD", 1])
    tiny_runs.train(cfg, until=1)
    assert not (tmp_path / "teacher" / "model_final.pth").exists()
    main(["--config-file", str(student), "SOLVER.MAX_ITER", "1"])
    log = (tmp_path / "student" / "log.txt").read_text()
    assert f"Resumed from {tmp_path / 'teacher' / 'model_0000000.pth'}" in log
    assert (tmp_path / "student" / "model_final.pth").exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    at = len(content) // 2  # among the tensors
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "periodic"), [(flip, True), (None, True), (cut, False), (lambda _: b"text", False)]
)
def test_a_damaged_teacher_is_made_again(
    auto: tuple[Path, Path], tmp_path: Path, damage: Any, periodic: bool
) -> None:
    teacher, student = auto
    tiny_runs.train(tiny_runs.load_config(str(teacher), ["SOLVER.CHECKPOINT_PERIOD", 1]))
    folder = tmp_path / "teacher"
    weights = folder / "model_final.pth"
    good = torch.load(weights)["model"]
    files = [folder / "model_0000000.pth", folder / "model_0000001.pth", weights]
    for file in files[2:] if periodic else files:
        content = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage(content))
    main(["--config-file", str(student), "SOLVER.MAX_ITER", "1"])
    log = (tmp_path / "student" / "log.txt").read_text()
    lacks = "is not there yet" if damage is None else r"is damaged \(\w+: .*\)"
    assert re.search(rf"The teacher's checkpoint {weights} {lacks}: training it first", log)
    assert ("Resumed from" in log) == periodic
    assert tiny_runs.equal_states(dict(torch.load(weights)["model"]), dict(good))
    if damage is not None:
        assert weights.with_name("model_final.pth.damaged").exists()
    # Repeating it finds nothing to mend.
    main(["--config-file", str(student), "--resume", "SOLVER.MAX_ITER", "1"])
    assert (tmp_path / "student" / "log.txt").read_text().count("training it first") == 1


def test_a_foreign_file_in_the_teachers_place_stays(
    auto: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is whole: somebody's, and no damage that training may replace."""
    weights = tmp_path / "teacher" / "model_final.pth"
    weights.parent.mkdir()
    torch.save({"model": {}, "config": Path("x")}, weights)
    content = weights.read_bytes()
    with pytest.raises(RefusedFileError, match=r"model_final\.pth is no file of tensors"):
        main(["--config-file", str(auto[1])])
    assert weights.read_bytes() == content


class TestEvalOnly:
    @pytest.fixture
    def trained(
        self, tiny_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Path, dict[str, Any]]:
        """A finished run whose teacher is gone, and its final metrics."""
        keys = {**tiny_runs.distil_keys("fcos", tiny_teacher("fcos")), **EVALUATED}
        keys |= {"SOLVER.CHECKPOINT_PERIOD": 1, "MODEL.FCOS.SCORE_THRESH_TEST": 0.0}
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
        metrics = main(["--config-file", str(path)])
        keys |= {"KD.TEACHER.CONFIG_FILE": "gone.yaml", "KD.TEACHER.WEIGHTS": "gone.pth"}
        tiny_runs.write_config(path, "fcos", keys)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a teacher was built")

        monkeypatch.setattr(detector_module, "build_teacher", refuse)
        return path, metrics

    def test_needs_no_teacher_and_gives_the_same_numbers(
        self, trained: tuple[Path, dict[str, Any]]
    ) -> None:
        path, metrics = trained
        again = main(["--config-file", str(path), "--eval-only"])
        assert str(again) == str(metrics)  # nan is not equal to itself

    def test_takes_mid_run_final_and_stock_checkpoints(
        self, trained: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        path, metrics = trained
        final = torch.load(tmp_path / "run" / "model_final.pth")
        torch.save({"model": final["model"]}, tmp_path / "stock.pth")
        for weights in ("run/model_0000000.pth", "run/model_final.pth", "stock.pth"):
            words = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / weights)]
            found = main(["--config-file", str(path), *words])
            assert set(found["bbox"]) == set(metrics["bbox"])
            if weights != "run/model_0000000.pth":
                assert str(found) == str(metrics)

    def test_resume_takes_the_last_checkpoint_whatever_the_weights_say(
        self, trained: tuple[Path, dict[str, Any]]
    ) -> None:
        path, metrics = trained
        words = ["--eval-only", "--resume", "MODEL.WEIGHTS", "/nowhere.pth"]
        assert str(main(["--config-file", str(path), *words])) == str(metrics)


def test_the_script_at_the_top(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_runs.write_config(tmp_path / "run.yaml", "retinanet", {})
    script = tiny_runs.BASE.parents[1] / "train_net.py"
    words = ["--config-file", str(path), "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    assert read(tmp_path / "o" / "result.json")["iterations"] == 1
    assert torch.load(tmp_path / "o" / "model_final.pth")["iteration"] == 0


def test_log_has_the_inherited_tensors(
    tiny_teacher: MakeTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """kd_det's own messages reach the console and log.txt, as Detectron2's do."""
    keys = tiny_runs.distil_keys("fcos", tiny_teacher("fcos"))
    keys |= {"KD.INHERIT": ["head"], "MODEL.FPN.OUT_CHANNELS": 48, "SOLVER.MAX_ITER": 1}
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
    with caplog.at_level(logging.DEBUG):
        main(["--config-file", str(path)])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Inherited" in log
    assert "head.cls_score.weight" in log
