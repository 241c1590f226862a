"""
Whole small trainings on the built-in shapes: every dense detector learns, and learns four images by
heart; distillation bites.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_det.engine.main import main

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
SHORT = ["SOLVER.MAX_ITER", "120", "SOLVER.WARMUP_ITERS", "20", "DATASETS.TEST", "[]"]

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "total_loss" in row]


# Of each detector, losses that fall, what is left of them at most, and the AP50 at least (of random
# weights: 0). GFL's class score is trained towards the IoU of its own boxes, about zero at first:
# while they improve, it rises (from 0.26 to 0.39), and the sum hardly falls. AutoAssign's loss has
# every position inside a box; FSAF's towers have no norm, and its loss stays where it is for half
# of these steps.
DETECTORS = {
    "student": (["total_loss"], 0.8, 1.0),
    "atss": (["total_loss"], 0.8, 1.0),
    "gfl": (["loss_gfl_loc", "loss_gfl_dfl"], 0.8, 1.0),
    "autoassign": (["total_loss"], 0.85, 1.0),
    "fsaf": (["total_loss"], 0.8, 0.3),
}


@pytest.mark.parametrize("config", DETECTORS)
def test_a_detector_learns(config: str, tmp_path: Path) -> None:
    own = ["DATASETS.TEST", "('shapes_val',)", "OUTPUT_DIR", str(tmp_path)]
    metrics = main(["--config-file", str(CONFIGS / f"{config}.yaml"), *SHORT, *own])
    rows = losses(tmp_path)
    falling, left, ap50 = DETECTORS[config]
    for name in falling:
        assert rows[-1][name] < left * rows[0][name]
    assert metrics["bbox"]["AP50"] > ap50


# A step sees all four images as they are; the learning rate ends at 0.
BY_HEART = [
    *["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "300", "SOLVER.WARMUP_ITERS", "20"],
    *["SOLVER.WEIGHT_DECAY", "0.0", "INPUT.RANDOM_FLIP", "none"],
]
# torchvision's deformable convolution takes a CPU long.
NARROW = ["MODEL.FPN.OUT_CHANNELS", "32"]
HEARTS = {
    "autoassign": [],
    "ddod": NARROW,
    # Its first boxes are tiny.
    "reppoints": [*NARROW, "SOLVER.MAX_ITER", "600", "SOLVER.BASE_LR", "0.004"],
    # Its towers have no norm: the other detectors' rate of 0.002 leaves 97 % of the box tower's
    # ReLUs at zero, and every box stays what it was at first.
    "fsaf": ["SOLVER.BASE_LR", "0.0007"],
}


@pytest.mark.parametrize("config", HEARTS)
def test_a_detector_learns_four_images_by_heart(
    config: str, tmp_path: Path, four_shapes: Callable[..., str]
) -> None:
    four = f"('{four_shapes()}',)"
    data = ["DATASETS.TRAIN", four, "DATASETS.TEST", four, "OUTPUT_DIR", str(tmp_path)]
    own = [*BY_HEART, *HEARTS[config], *data]
    metrics = main(["--config-file", str(CONFIGS / f"{config}.yaml"), *own])
    assert metrics["bbox"]["AP"] > 80


@pytest.mark.parametrize("config", ["feature_lp.yaml", "ssim.yaml", "pgd.yaml"])
def test_a_student_comes_closer_to_its_teacher(config: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    main(["--config-file", str(CONFIGS / "teacher.yaml"), *SHORT, "OUTPUT_DIR", str(teacher)])
    out = tmp_path / "student"
    weights = ["KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth"), "OUTPUT_DIR", str(out)]
    main(["--config-file", str(CONFIGS / config), *SHORT, *weights])
    rows = losses(out)
    distilled = [sum(v for k, v in row.items() if k.startswith("loss_kd_")) for row in rows]
    assert distilled[-1] < 0.9 * distilled[0]
    assert rows[-1]["loss_fcos_cls"] < rows[0]["loss_fcos_cls"]
