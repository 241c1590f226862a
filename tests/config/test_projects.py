"""Detectron2's projects come in through KD.PLUGINS: PointRend, and TridentNet where it is."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import TinyTeacher

from kd_det.engine.main import main

# What TridentNet is at inference: the middle branch, whose dilated filters all branches share.
TRIDENT_STAND_IN = """
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone

def add_tridentnet_config(cfg):
    cfg.MODEL.TRIDENT = CfgNode()
    cfg.MODEL.TRIDENT.NUM_BRANCH = 3
    cfg.MODEL.TRIDENT.BRANCH_DILATIONS = [1, 2, 3]
    cfg.MODEL.TRIDENT.TRIDENT_STAGE = "res4"
    cfg.MODEL.TRIDENT.TEST_BRANCH_IDX = 1

@BACKBONE_REGISTRY.register()
def build_trident_resnet_backbone(cfg, input_shape):
    backbone = build_resnet_backbone(cfg, input_shape)
    keys = cfg.MODEL.TRIDENT
    dilation = keys.BRANCH_DILATIONS[keys.TEST_BRANCH_IDX]
    for block in getattr(backbone, keys.TRIDENT_STAGE)[1:]:
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    return backbone
"""
POINT_REND: dict[str, Any] = {
    "KD.PLUGINS": ["detectron2.projects.point_rend:add_pointrend_config"],
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "PointRendMaskHead",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_MASK_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": True,
    "MODEL.POINT_HEAD.NUM_CLASSES": 2,
    "MODEL.POINT_HEAD.FC_DIM": 32,
    "INPUT.MASK_FORMAT": "bitmask",
}


def last_losses(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {k: v for line in lines for k, v in line.items() if "loss" in k}


@pytest.mark.filterwarnings("default")  # what other people's packages warn of is theirs
def test_point_rend_teaches_and_learns(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("detectron2.projects.point_rend")
    teacher = tiny_runs.make_teacher(tmp_path, "mask_rcnn", **POINT_REND)
    keys = {
        **tiny_runs.distil_keys("mask_rcnn", teacher),
        **POINT_REND,
        "KD.DATASETS": [tiny_data],
        "DATASETS.TEST": [tiny_data["name"]],
        "SOLVER.MAX_ITER": 2,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    config = tiny_runs.write_config(tmp_path / "run.yaml", "mask_rcnn", keys)
    metrics = main(["--config-file", str(config)])
    losses = last_losses(tmp_path / "run")
    assert {"loss_mask", "loss_mask_point", "loss_kd_feature_lp"} <= set(losses)
    assert all(math.isfinite(value) for value in losses.values())
    assert set(metrics) == {"bbox", "segm"}


@pytest.fixture
def tridentnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Detectron2's projects/TridentNet, where it is on the path, or what it is at inference."""
    if importlib.util.find_spec("tridentnet") is None:
        (tmp_path / "tridentnet.py").write_text(TRIDENT_STAND_IN)
        monkeypatch.syspath_prepend(tmp_path)
    return "tridentnet:add_tridentnet_config"


@pytest.mark.filterwarnings("default")
def test_tridentnet_teaches(
    tridentnet: str,
    tiny_data: dict[str, str],
    tiny_student: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Its keys are the teacher's own; the student, a Faster R-CNN, knows nothing of them."""
    c4: dict[str, Any] = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16, 32]],
    }
    trident = {
        **c4,
        "KD.PLUGINS": [tridentnet],
        "MODEL.BACKBONE.NAME": "build_trident_resnet_backbone",
        "MODEL.TRIDENT.BRANCH_DILATIONS": [1, 2, 3],
    }
    made: TinyTeacher = tiny_runs.make_teacher(tmp_path, "faster_rcnn", **trident)
    cfg = tiny_student("faster_rcnn", made, {**c4, "SOLVER.MAX_ITER": 2})
    trainer, recorder = tiny_runs.train(cfg)
    assert all(step["loss_kd_feature_lp"] > 0 for step in recorder.steps)
    conv = trainer._plain_model().teacher.model.backbone.res4[-1].conv2
    # The middle branch: the project keeps its number, the stand-in is that branch.
    assert getattr(conv, "test_branch_idx", None) == 1 or conv.dilation == (2, 2)
