"""
Whole small trainings on the built-in shapes: every dense detector learns, and learns four images by
heart; distillation bites.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_det.data.styles import V2
from kd_det.engine.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["SOLVER.MAX_ITER", "120", "SOLVER.WARMUP_ITERS", "20", "DATASETS.TEST", "[]"]

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "total_loss" in row]


# Of each detector, losses that fall, what is left of them at most, and the AP50 at least (of random
# weights: 0). GFL's class score is trained towards the IoU of its own boxes, about zero at first:
# while they improve, it rises (from 0.26 to 0.39), and the sum hardly falls. Those of shapes
# start from random weights, the others from ImageNet.
DETECTORS = {
    "shapes/student": (["total_loss"], 0.8, 1.0),
    "shapes/atss": (["total_loss"], 0.8, 1.0),
    "shapes/gfl": (["loss_gfl_loc", "loss_gfl_dfl"], 0.8, 1.0),
    "detectors/autoassign": (["total_loss"], 0.8, 20.0),
    "detectors/fsaf": (["total_loss"], 0.8, 5.0),
    "detectors/ddod": (["total_loss"], 0.8, 5.0),
    "detectors/reppoints": (["total_loss"], 0.8, 1.0),
}


@pytest.mark.parametrize("config", DETECTORS)
def test_a_detector_learns(config: str, tmp_path: Path) -> None:
    test = "shapes_val" if config.startswith("shapes/") else "shapes2_val"
    own = ["DATASETS.TEST", f"('{test}',)", "OUTPUT_DIR", str(tmp_path)]
    metrics = main(["--config-file", str(CONFIGS / f"{config}.yaml"), *SHORT, *own])
    rows = losses(tmp_path)
    falling, left, ap50 = DETECTORS[config]
    for name in falling:
        assert rows[-1][name] < left * rows[0][name]
    assert metrics["bbox"]["AP50"] > ap50


# A step sees all four images as they are; the learning rate ends at 0.
BY_HEART = [
    *["SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "20"],
    *["SOLVER.WEIGHT_DECAY", "0.0", "INPUT.RANDOM_FLIP", "none"],
]
# RepPoints' first boxes are tiny, and it learns its classes at the points that they move to.
HEARTS = {"autoassign": "300", "ddod": "300", "reppoints": "600", "fsaf": "300"}


@pytest.mark.parametrize("config", HEARTS)
def test_a_detector_learns_four_images_by_heart(
    config: str, tmp_path: Path, four_shapes: Callable[..., str]
) -> None:
    four = f"('{four_shapes(V2)}',)"
    data = ["DATASETS.TRAIN", four, "DATASETS.TEST", four, "OUTPUT_DIR", str(tmp_path)]
    file = CONFIGS / "detectors" / f"{config}.yaml"
    steps = ["SOLVER.MAX_ITER", HEARTS[config]]
    metrics = main(["--config-file", str(file), *BY_HEART, *steps, *data])
    assert metrics["bbox"]["AP"] > 80


@pytest.mark.parametrize("config", ["feature_lp.yaml", "ssim.yaml", "pgd.yaml"])
def test_a_student_comes_closer_to_its_teacher(config: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    main(
        ["--config-file", str(CONFIGS / "shapes/teacher.yaml"), *SHORT, "OUTPUT_DIR", str(teacher)]
    )
    out = tmp_path / "student"
    weights = ["KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth"), "OUTPUT_DIR", str(out)]
    main(["--config-file", str(CONFIGS / "shapes" / config), *SHORT, *weights])
    rows = losses(out)
    distilled = [sum(v for k, v in row.items() if k.startswith("loss_kd_")) for row in rows]
    assert distilled[-1] < 0.9 * distilled[0]
    assert rows[-1]["loss_fcos_cls"] < rows[0]["loss_fcos_cls"]
