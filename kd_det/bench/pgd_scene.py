"""
What the benchmark of PGD measures with: scenes, a loop over boxes as the reference, a student.

`kd_det.bench.pgd` is the benchmark itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from kd_det.config import add_kd_config
from kd_det.functional.gaussian_importance import RIDGE, prediction_quality
from kd_det.functional.level_grid import Grid, grid_positions

STRIDES = (8, 16, 32, 64, 128)
CLASSES, CHANNELS, TOP_K, EXPONENTS = 80, 256, 30, (0.8, 0.6)


def pyramid(size: tuple[int, int]) -> list[Grid]:
    """Return the grids P3..P7 of a batch of images (height, width) padded to multiples of 32."""
    height, width = (math.ceil(side / 32) * 32 for side in size)
    return [Grid(math.ceil(height / s), math.ceil(width / s), s) for s in STRIDES]


class Scene(NamedTuple):
    """Arguments of `importance_maps` for two images with M boxes each; ground truth on the CPU."""

    logits: Tensor
    boxes: Tensor
    gt_boxes: Tensor
    gt_classes: Tensor
    grids: Sequence[Grid]

    @classmethod
    def random(
        cls, grids: Sequence[Grid], size: tuple[int, int], count: int, device: str
    ) -> "Scene":
        """Draw predictions, and boxes by `random_boxes`."""
        generator = torch.Generator().manual_seed(0)
        points = grid_positions(grids).float()
        strides = torch.tensor([v.stride for v in grids for _ in range(v.height * v.width)])
        reach = torch.rand(2, len(points), 4, generator=generator) * 6 * strides[:, None]
        gt_boxes = random_boxes(size, 2, count, generator)
        return cls(
            logits=torch.randn(2, len(points), CLASSES, generator=generator).sub(2).to(device),
            boxes=torch.cat([points - reach[..., :2], points + reach[..., 2:]], dim=2).to(device),
            gt_boxes=gt_boxes,
            gt_classes=torch.randint(0, CLASSES, (2, count), generator=generator),
            grids=grids,
        )


def random_boxes(
    size: tuple[int, int], images: int, count: int, generator: torch.Generator
) -> Tensor:
    """Draw (N, M, 4) boxes in images of (height, width), sides log-uniform from 16 px to half."""
    extent = torch.tensor([size[1], size[0]])
    sides = 16 * (extent / 32) ** torch.rand(images, count, 2, generator=generator)
    corner = torch.rand(images, count, 2, generator=generator) * (extent - sides)
    return torch.cat([corner, corner + sides], dim=2)


def looped_targets(scene: Scene) -> list[Tensor]:
    """Compute the same by a loop over images and boxes, each step for all positions at once."""
    device = scene.logits.device
    points = grid_positions(scene.grids).to(device)
    x, y = points.float().unbind(1)
    num_images, num_positions = scene.boxes.shape[:2]
    maps = [torch.zeros(num_images, num_positions, device=device) for _ in EXPONENTS]
    background = torch.ones(num_images, num_positions, dtype=torch.bool, device=device)
    for n in range(num_images):
        u0, v0, u1, v1 = scene.boxes[n].unbind(1)
        area = (u1 - u0) * (v1 - v0)
        for gt, label in zip(scene.gt_boxes[n].tolist(), scene.gt_classes[n].tolist(), strict=True):
            x0, y0, x1, y1 = gt
            inside = (x > x0) & (y > y0) & (x < x1) & (y < y1)
            background[n] &= ~inside
            width = (u1.clamp(max=x1) - u0.clamp(min=x0)).clamp(min=0)
            height = (v1.clamp(max=y1) - v0.clamp(min=y0)).clamp(min=0)
            common = width * height
            iou = common / (area + (x1 - x0) * (y1 - y0) - common)
            probability = scene.logits[n, :, label].sigmoid() * inside
            for importance, exponent in zip(maps, EXPONENTS, strict=True):
                best = prediction_quality(probability, iou, exponent).topk(
                    min(TOP_K, num_positions)
                )
                chosen = best.indices[best.values > 0]
                if len(chosen) == 0:
                    continue
                offset = points[chosen] - points[chosen].mean(0)
                sigma = offset.T @ offset / len(chosen) + RIDGE * torch.eye(2).to(offset)
                distance = (offset @ torch.linalg.inv(sigma) * offset).sum(1)
                weight = torch.exp(-0.5 * distance).float()
                importance[n, chosen] = torch.maximum(importance[n, chosen], weight)
    return [*maps, background]


def student_step(
    size: tuple[int, int], scene: Scene, depth: int, device: str
) -> Callable[[], None]:
    """Return a function that runs an FCOS's forward and backward pass on one image."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.DEVICE = device
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.TOP_BLOCK = "p6p7_p5"
    model = build_model(cfg).train()
    instances = Instances(size, gt_boxes=Boxes(scene.gt_boxes[0]), gt_classes=scene.gt_classes[0])
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8), "instances": instances}]

    def step() -> None:
        with EventStorage():
            sum(model(inputs).values()).backward()
        model.zero_grad()

    return step
