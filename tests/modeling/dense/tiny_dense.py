"""Dense detectors small enough for tests, built from configs/base, and images for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import kd_det.modeling  # noqa: F401
from kd_det.config import load_config

BASE = Path(__file__).parents[3] / "configs" / "base"
CLASSES = 3
# Strides 8, 16 and 32; GroupNorm, so that images of a batch do not mix.
_SMALL = [
    *["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.PIXEL_STD", [58.0] * 3],
    *["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.DEPTH", 18],
    *["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32],
    *["MODEL.FPN.OUT_CHANNELS", 16],
]


def build_tiny(name: str, *opts: Any, seed: int = 0) -> nn.Module:
    """Build "atss", "gfl", "fcos" or "retinanet" on levels p3 to p5."""
    torch.manual_seed(seed)
    keys = f"MODEL.{name.upper()}"
    small = [f"{keys}.NUM_CLASSES", CLASSES, f"{keys}.NUM_CONVS", 1]
    small += [f"{keys}.IN_FEATURES", ["p3", "p4", "p5"]]
    return build_model(load_config(str(BASE / f"{name}_r50_fpn.yaml"), [*_SMALL, *small, *opts]))


def make_image(boxes: Sequence[Sequence[float]], classes: Sequence[int], seed: int = 1) -> dict:
    """A 64 x 96 image of noise with a flat patch of its class's colour in each box."""
    image = torch.randint(90, 110, (3, 64, 96), generator=torch.Generator().manual_seed(seed))
    for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
        image[:, int(y1) : int(y2), int(x1) : int(x2)] = 0
        image[label, int(y1) : int(y2), int(x1) : int(x2)] = 255
    instances = Instances(
        (64, 96),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )
    return {"image": image.to(torch.uint8), "instances": instances}


def two_images() -> list[dict]:
    return [
        make_image([[4, 4, 40, 36], [50, 20, 90, 60]], [0, 2]),
        make_image([[20, 10, 68, 50]], [1], seed=2),
    ]


def no_objects() -> dict:
    return make_image([], [], seed=3)


def losses_of(model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    """Losses with a fresh running normaliser, so that separate calls compare."""
    vars(model).pop("loss_normalizer", None)
    with EventStorage():
        return model(batch)


def overfit(model: nn.Module, batch: list[dict], steps: int) -> list[float]:
    """Train on one batch; return the sum of losses of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    totals = []
    # A settled normaliser, so that a falling loss is not the normaliser's rise.
    model.loss_normalizer = 10.0
    with EventStorage():
        for _ in range(steps):
            total = sum(model(batch).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    return totals
