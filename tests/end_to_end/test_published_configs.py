"""Every published distillation takes steps, its models at full width, on small images."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

import kd_det.modeling  # noqa: F401
from kd_det.config import load_config, needs_teacher
from kd_det.distillers import node_name

FOLDER = Path(__file__).parents[2] / "configs"
FILES = [x for part in ("coco", "crowdhuman") for x in sorted((FOLDER / part).rglob("*.yaml"))]
PUBLISHED = [path for path in FILES if needs_teacher(load_config(str(path)))]
SIZE = (128, 160)

pytestmark = pytest.mark.slow


def offline(path: str) -> CfgNode:
    cfg = load_config(path)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    return cfg


def calm(state: dict[str, torch.Tensor]) -> None:
    """Make residual branches of random weights small: under frozen norms each lets maps grow."""
    for key, value in state.items():
        if key.endswith("conv3.norm.weight"):
            value.fill_(0.1)


def image_of(cfg: CfgNode) -> dict[str, object]:
    boxes = torch.tensor([[12.0, 8.0, 90.0, 70.0], [60.0, 50.0, 150.0, 120.0]])
    instances = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 0]))
    if cfg.MODEL.MASK_ON:
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
    if cfg.MODEL.KEYPOINT_ON:
        points = np.random.default_rng(0).uniform((20, 20, 2), (80, 60, 2), (2, 17, 3))
        instances.gt_keypoints = Keypoints(points)
    return {"image": torch.rand(3, *SIZE) * 255, "instances": instances}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(FOLDER)))
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_takes_two_steps(path: Path) -> None:
    torch.manual_seed(0)
    cfg = offline(str(path))
    with TemporaryDirectory() as folder:
        teacher = offline(cfg.KD.TEACHER.CONFIG_FILE)
        weights = tiny_runs.save_random_weights(teacher, Path(folder) / "teacher.pth")
        content = torch.load(weights)
        calm(content["model"])
        torch.save(content, weights)
        cfg.KD.TEACHER.WEIGHTS = str(weights)
        model = build_model(cfg).train()
    calm(model.student.state_dict())
    # A pattern of KD.INHERIT that copies nothing is an error.
    assert bool(model.inherit_from_teacher()) == bool(cfg.KD.INHERIT)
    for active in model.active.values():
        if active.auto is not None:  # where no weight is published
            active.auto.start = 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    for iteration in (cfg.SOLVER.MAX_ITER // 2, cfg.SOLVER.MAX_ITER // 2 + 1):
        with EventStorage(iteration):
            losses = model([image_of(cfg), image_of(cfg)])
        assert all(value.isfinite() for value in losses.values()), losses
        for name in cfg.KD.DISTILLERS:
            assert any(key.startswith(f"loss_kd_{node_name(name).lower()}") for key in losses)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    if cfg.KD.DISTILLERS:  # else it is gone once it has bequeathed
        assert all(p.grad is None for p in model.teacher.model.parameters())
