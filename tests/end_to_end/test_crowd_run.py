"""The synthetic crowd from yaml: trained, evaluated, PGD with ignored regions."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from tiny_crowd import crowd_kept_in

from kd_det.config import load_config
from kd_det.data import CheckedDatasetMapper
from kd_det.distillation.detector import targets_of
from kd_det.distillers import PGD
from kd_det.distillers.predictions import decode_dense
from kd_det.engine.main import main

CONFIGS = Path(__file__).parents[2] / "configs" / "crowdhuman"
TINY = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"]


@pytest.fixture
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with crowd_kept_in(tmp_path_factory.getbasetemp() / "cache"):
        yield


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
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    distilled = [row for row in rows if "loss_kd_pgd_cls" in row]
    assert distilled
    assert all(row["loss_kd_pgd_cls"] > 0 and row["loss_kd_pgd_reg"] >= 0 for row in distilled)


def test_ignored_regions_reach_the_background(crowd: None) -> None:
    cfg = load_config(str(CONFIGS / "tiny.yaml"))
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    records = [r for r in DatasetCatalog.get("crowd_tiny_train") if r["annotations"]]
    batch = [mapper(record) for record in records[:6]]
    targets = targets_of(batch)
    assert sum(len(boxes) for boxes in targets.ignored) > 0
    teacher = build_model(cfg).eval()
    images = teacher.preprocess_image(batch)
    with torch.no_grad():
        maps = teacher.backbone(images.tensor)
        outputs = teacher.head([maps[name] for name in teacher.head_in_features])
    predictions = decode_dense(teacher, outputs)
    counted = PGD(mask_ignored=False).masks(predictions, targets).background
    left_out = PGD(mask_ignored=True).masks(predictions, targets).background
    assert sum(int(x.sum()) for x in left_out) < sum(int(x.sum()) for x in counted)
    assert all(bool((x <= y).all()) for x, y in zip(left_out, counted, strict=True))
