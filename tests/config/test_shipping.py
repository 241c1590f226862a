"""What is deployed without kd_det is built there, and predicts the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import deployed
import pytest
import tiny_runs
import torch
from detectron2.modeling import build_model

from kd_det.config import load_config, stock_cfg, student_cfg

_SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "own": ("retinanet", {"MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone"}),
    "p6p7_c5": ("retinanet", {}),
    "maxpool": ("faster_rcnn", {}),
}
_DEPLOYED = """
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

for name in ("own", "p6p7_c5", "maxpool"):
    cfg = get_cfg()
    cfg.merge_from_file(f"{name}.yaml")
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(f"{name}.pth", weights_only=True)["model"], strict=True)
    with torch.no_grad():
        out = model([{"image": torch.load("image.pt", weights_only=True)}])[0]["instances"]
    torch.save([out.pred_boxes.tensor, out.scores], f"{name}.found")
"""


def ship(folder: Path, name: str, image: torch.Tensor) -> Any:
    """Write a student's stock yaml and weights; return what kd_det's own model finds."""
    detector, keys = _SHIPPED[name]
    keys = {
        **tiny_runs.distil_keys(detector, None),
        "KD.STUDENT.VIEW_FACTOR": 2.0,
        "INPUT.MIN_SIZE_TEST": 128,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        **keys,
    }
    cfg = load_config(str(tiny_runs.write_config(folder / "run.yaml", detector, keys, r50=True)))
    weights = tiny_runs.save_random_weights(cfg, folder / f"{name}.pth")
    model = build_model(student_cfg(cfg)).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    shipped = stock_cfg(cfg)
    assert shipped.INPUT.MIN_SIZE_TEST == 64
    (folder / f"{name}.yaml").write_text(shipped.dump())
    with torch.no_grad():
        return model([{"image": image}])[0]["instances"]


def test_a_process_without_kd_det(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    torch.save(image, tmp_path / "image.pt")
    expected = {name: ship(tmp_path, name, image) for name in _SHIPPED}
    code = deployed.without_kd_det(_DEPLOYED)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, own in expected.items():
        boxes, scores = torch.load(tmp_path / f"{name}.found", weights_only=True)
        assert len(scores) > 0
        torch.testing.assert_close(boxes, own.pred_boxes.tensor)
        torch.testing.assert_close(scores, own.scores)


@pytest.mark.parametrize(
    ("detector", "keys", "message"),
    [
        ("atss", {}, r"META_ARCHITECTURE ATSS is of kd_det\.modeling.*student_cfg.*add_kd_config"),
        ("retinanet", {}, r"BACKBONE.NAME build_fpn_backbone is of kd_det"),
        ("retinanet", {"MODEL.RESNETS.DEPTH": 50, "MODEL.FPN.TOP_BLOCK": "p6p7_p5"}, r"BACKBONE"),
        ("retinanet", {"MODEL.RESNETS.DEPTH": 50, "MODEL.FPN.NORM": "GN"}, r"BACKBONE"),
        ("retinanet", {"MODEL.FPN.BOTTOM_UP": "timm"}, r"BACKBONE"),
    ],
    ids=["detector", "narrow R18", "other levels", "other norm", "timm"],
)
def test_what_is_kd_dets_own_is_refused(
    tmp_path: Path, detector: str, keys: dict[str, Any], message: str
) -> None:
    path = tiny_runs.write_config(tmp_path / "run.yaml", detector, keys)
    with pytest.raises(ValueError, match=message):
        stock_cfg(load_config(str(path)))


def test_the_config_itself_stays(tmp_path: Path) -> None:
    """kd_det builds its students of it, and of `student_cfg`, which keeps every key but KD."""
    path = tiny_runs.write_config(tmp_path / "run.yaml", "retinanet", {}, r50=True)
    cfg = load_config(str(path))
    before = cfg.dump()
    stock_cfg(cfg)
    assert cfg.dump() == before
    assert "ALIGNED" in student_cfg(cfg).MODEL
