"""
Two 32 x 32 images on which the losses of dense detectors were computed apart from this package.

Strides 8 and 16, grids of 4 x 4 and 2 x 2: positions p = 0 .. 19, level by level and row by row; 2
classes. Image 0 has two boxes, image 1 none. Outputs are sines of image n, position p and channel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from tiny_dense import build_tiny
from torch import Tensor, nn

BOXES = [[2.3, 3.1, 23.9, 17.7], [9.2, 6.4, 30.6, 30.2]]
BOX_CLASSES = [1, 0]
_SIZES = [(4, 4), (2, 2)]
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def build(name: str, *opts: Any) -> nn.Module:
    keys = f"MODEL.{name.upper()}"
    return build_tiny(name, f"{keys}.NUM_CLASSES", 2, f"{keys}.IN_FEATURES", ["p3", "p4"], *opts)


def maps(channels: int, formula: Formula, images: Sequence[int] = (0, 1)) -> list[Tensor]:
    """Return per level (N, channels, H, W) of `formula(n, p, channel)`."""
    n = torch.tensor(images, dtype=torch.float64)[:, None, None]
    p = torch.arange(20, dtype=torch.float64)[:, None]
    values = formula(n, p, torch.arange(channels, dtype=torch.float64)).float().transpose(1, 2)
    parts = values.expand(len(images), channels, 20).split([16, 4], dim=2)
    return [x.unflatten(2, size).contiguous() for x, size in zip(parts, _SIZES, strict=True)]


def class_logits(images: Sequence[int] = (0, 1)) -> list[Tensor]:
    return maps(2, lambda n, p, k: 2 * torch.sin(1 + 3 * n + p + 7 * k) - 1, images)


def instances(boxes: Sequence[Sequence[float]], classes: Sequence[int]) -> Instances:
    return Instances(
        (32, 32),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


TRUTH = [instances(BOXES, BOX_CLASSES), instances([], [])]
# Three images: objects that overlap, none, and others.
THREE = [*TRUTH, instances([[0, 0, 31, 30], [4, 4, 21, 12], [15, 15, 30, 29]], [0, 1, 1])]


def flat(levels: list[Tensor]) -> Tensor:
    """Return (N, R, channels) of maps (N, channels, H, W)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


def anchors_of(model: nn.Module) -> list[Tensor]:
    return [x.tensor for x in model.anchor_generator(class_logits())]


def losses(
    model: nn.Module, predictions: tuple[list[Tensor], ...], truth: list[Instances]
) -> dict[str, Tensor]:
    images = ImageList(torch.zeros(len(truth), 3, 32, 32), [(32, 32)] * len(truth))
    features = [torch.zeros(len(truth), 1, *size) for size in _SIZES]
    with EventStorage():
        out: dict[str, Tensor] = model.forward_training(images, features, predictions, truth)
    return out
