"""The configs on the photographs of the checkout, for two steps, from any working directory."""

import json
from pathlib import Path

import pytest
import tiny_runs
import torch

from kd_det.config import load_config
from kd_det.engine.main import main

CONFIGS = Path(__file__).parents[2] / "configs" / "aquarium"
ABSENT = "package://not_installed"


def test_two_steps_of_ssim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds every tensor: who loads one needs no package of ImageNet weights."""
    pytest.importorskip("timm", reason="needs the extra timm")
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    own = load_config(str(CONFIGS / "teacher.yaml"), ["MODEL.TIMM.WEIGHTS", ""])
    teacher = tiny_runs.save_random_weights(own, tmp_path / "teacher.pth")
    run = ["--config-file", str(CONFIGS / "ssim.yaml")]
    words = [
        *["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"],
        *["DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path), "KD.TEACHER.WEIGHTS", str(teacher)],
        *["KD.TEACHER.OPTS", f"['MODEL.TIMM.WEIGHTS', '{ABSENT}']", "MODEL.TIMM.WEIGHTS"],
    ]
    main([*run, *words, ""])
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    losses = {k: v for line in lines for k, v in json.loads(line).items() if k.startswith("loss")}
    assert any(key.startswith("loss_kd_ssim") for key in losses)
    assert all(0 <= value < 100 for value in losses.values())
    model = torch.load(tmp_path / "model_final.pth")["model"]
    assert all(torch.isfinite(value).all() for value in model.values())
    main([*run, "--eval-only", *words, ABSENT])
    with pytest.raises(ImportError, match="no package not_installed is installed"):
        main([*run, *words, ABSENT])
