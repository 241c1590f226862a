"""The synthetic crowd from yaml: trained, evaluated, PGD with ignored regions."""

from pathlib import Path

import pytest
import tiny_runs
import torch

from kd_det.engine.main import main

CONFIGS = Path(__file__).parents[2] / "configs" / "crowdhuman"
TINY = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"]


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("KD_DET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_evaluation_prints_all_three_metrics(
    crowd: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = ["--config-file", str(CONFIGS / "tiny.yaml")]
    out = ["OUTPUT_DIR", str(tmp_path / "out")]
    trained = main([*config, *TINY, *out])
    capfd.readouterr()
    metrics = main([*config, "--eval-only", *out])
    assert set(metrics["bbox"]) == {"AP", "MR", "JI", "recall"}
    assert metrics["bbox"] == trained["bbox"]
    row = next(line for line in capfd.readouterr().out.splitlines() if "| " in line)
    assert [word.strip() for word in row.strip("|").split("|")] == ["AP", "MR", "JI", "recall"]


def test_pgd_learns_on_a_crowd_with_ignored_regions(crowd: None, tmp_path: Path) -> None:
    teacher = tiny_runs.TinyTeacher(CONFIGS / "tiny.yaml", tmp_path / "teacher" / "model_final.pth")
    common = [*TINY, "DATASETS.TEST", "[]"]
    main(
        [
            "--config-file",
            str(teacher.config_file),
            *common,
            "OUTPUT_DIR",
            str(tmp_path / "teacher"),
        ]
    )
    out = tmp_path / "student"
    settings = {
        "MODEL.META_ARCHITECTURE": "DistillationDetector",
        "KD.STUDENT.META_ARCHITECTURE": "FCOS",
        "KD.DISTILLERS": "['PGD']",
        "KD.TEACHER.CONFIG_FILE": str(teacher.config_file),
        "KD.TEACHER.WEIGHTS": str(teacher.weights),
        "KD.PGD.MASK_IGNORED": "True",
        "OUTPUT_DIR": str(out),
    }
    words = [word for pair in settings.items() for word in pair]
    main(["--config-file", str(CONFIGS / "tiny.yaml"), *common, *words])
    assert "teacher" in torch.load(out / "model_final.pth")["kd"]
