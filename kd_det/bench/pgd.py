"""
`kd-det bench pgd`: cost of PGD's targets and losses.

Targets (quality, selection, fit, masks) are timed against a loop over images and boxes written from
the formulas, vectorised over positions; the whole distiller, targets included, forward and
backward, against one training step of the student it would guide, an FCOS R50-FPN. Times are CPU
time of all threads, on a GPU wall time; what is compared runs side by side in every round, so that
ratios hold on a busy machine too.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor

from kd_det.bench.measure import device_name, peak_bytes, ratio, take_turns
from kd_det.config import add_kd_config
from kd_det.distillers.base import Pair, Step, Targets
from kd_det.distillers.pgd import PGD
from kd_det.distillers.predictions import DensePredictions
from kd_det.functional.gaussian_importance import (
    RIDGE,
    ImportanceOptions,
    importance_maps,
    prediction_quality,
)
from kd_det.functional.level_grid import (
    Grid,
    count_positions,
    grid_positions,
    positions_in_boxes,
)

STRIDES = (8, 16, 32, 64, 128)
CLASSES, CHANNELS, TOP_K, EXPONENTS = 80, 256, 30, (0.8, 0.6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="image size in pixels (default: 800 1333)",
    )
    parser.add_argument(
        "--boxes",
        type=int,
        nargs="+",
        default=(1, 10, 100, 500),
        metavar="M",
        help="ground-truth boxes per image (default: 1 10 100 500)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny images, few boxes, a small student, one round"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure, print two tables, and return what was measured.

    Args:
        args: what `add_arguments` adds.

    Returns:
        Setting; `targets`: for each number of boxes the milliseconds and extra bytes of both
        implementations; `losses`: seconds of the distiller and of the student's step, their ratio.
    """
    size, counts, rounds, device = tuple(args.size), list(args.boxes), args.rounds, args.device
    if args.quick:
        size, counts, rounds = (96, 128), [1, 10], 1
    grids = pyramid(size)
    print(f"Images of {size[0]}x{size[1]}, {count_positions(grids)} positions, 2 per batch.")
    scenes = {count: Scene.random(grids, size, count, device) for count in counts}
    targets = bench_targets(scenes, rounds, device)
    print(tabulate(targets, headers="keys", floatfmt=".4g"))
    losses = bench_losses(size, grids, rounds, device, depth=18 if args.quick else 50)
    print(tabulate([losses], headers="keys", floatfmt=".4g"))
    return {
        "device": device_name(device),
        "size": size,
        "positions": count_positions(grids),
        "images": 2,
        "rounds": rounds,
        "classes": CLASSES,
        "channels": CHANNELS,
        "targets": targets,
        "losses": losses,
    }


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
        """Draw predictions, and boxes with log-uniform sides of 16 px to half of the image."""
        generator = torch.Generator().manual_seed(0)
        points = grid_positions(grids).float()
        strides = torch.tensor([v.stride for v in grids for _ in range(v.height * v.width)])
        reach = torch.rand(2, len(points), 4, generator=generator) * 6 * strides[:, None]
        extent = torch.tensor([size[1], size[0]])
        sides = 16 * (extent / 32) ** torch.rand(2, count, 2, generator=generator)
        corner = torch.rand(2, count, 2, generator=generator) * (extent - sides)
        return cls(
            logits=torch.randn(2, len(points), CLASSES, generator=generator).sub(2).to(device),
            boxes=torch.cat([points - reach[..., :2], points + reach[..., 2:]], dim=2).to(device),
            gt_boxes=torch.cat([corner, corner + sides], dim=2),
            gt_classes=torch.randint(0, CLASSES, (2, count), generator=generator),
            grids=grids,
        )


def batched_targets(scene: Scene) -> list[Tensor]:
    """Compute both importance maps and the background, (2, R) each, as the product does."""
    valid = torch.ones_like(scene.gt_classes, dtype=torch.bool)
    maps = importance_maps(
        scene.logits,
        scene.boxes,
        scene.gt_boxes,
        scene.gt_classes,
        valid,
        scene.grids,
        ImportanceOptions(exponents=EXPONENTS, top_k=TOP_K),
    )
    background = ~positions_in_boxes(scene.grids, scene.gt_boxes, valid)
    return [*maps, background.to(scene.logits.device)]


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


def bench_targets(
    scenes: dict[int, Scene], rounds: int, device: str
) -> list[dict[str, float | None]]:
    """Measure both implementations of the targets for each number of boxes per image."""
    functions = {"batched": batched_targets, "loop": looped_targets}
    runs: dict[tuple[int, str], Callable[[], Any]] = {
        (count, name): partial(function, scene)
        for count, scene in scenes.items()
        for name, function in functions.items()
    }
    for count in scenes:  # both compute the same
        for found, expected in zip(runs[count, "batched"](), runs[count, "loop"](), strict=True):
            torch.testing.assert_close(found.cpu(), expected.cpu(), atol=1e-3, rtol=0)
    seconds = take_turns(runs, rounds, device, clock="cpu")
    rows: list[dict[str, float | None]] = []
    for count in scenes:
        batched, loop = seconds[count, "batched"], seconds[count, "loop"]
        ten = seconds.get((10, "batched"))
        rows.append(
            {
                "boxes": count,
                "batched_ms": 1e3 * median(batched),
                "loop_ms": 1e3 * median(loop),
                "speedup": ratio(loop, batched),
                "batched_over_10_boxes": ratio(batched, ten) if ten else None,
                "batched_extra_mb": peak_bytes(runs[count, "batched"], device) / 1e6,
                "loop_extra_mb": peak_bytes(runs[count, "loop"], device) / 1e6,
            }
        )
    return rows


def bench_losses(
    size: tuple[int, int], grids: Sequence[Grid], rounds: int, device: str, depth: int
) -> dict[str, Any]:
    """Measure PGD on one image of ten boxes against the training step of a student."""
    scene = Scene.random(grids, size, 10, device)
    distill, student = distillation(size, scene), student_step(size, scene, depth, device)
    runs = {"losses": distill, "student": student}
    seconds = take_turns(runs, rounds, device, clock="cpu")
    return {
        "student": f"FCOS R{depth}-FPN",
        "height": size[0],
        "width": size[1],
        "losses_s": median(seconds["losses"]),
        "student_step_s": median(seconds["student"]),
        "share": ratio(seconds["losses"], seconds["student"]),
        "losses_extra_mb": peak_bytes(distill, device) / 1e6,
    }


def distillation(size: tuple[int, int], scene: Scene) -> Callable[[], Any]:
    """Return a function that runs PGD on the first image, down to the gradients of both towers."""
    generator = torch.Generator().manual_seed(0)
    device = scene.logits.device

    def tower() -> list[Tensor]:
        shapes = [(1, CHANNELS, level.height, level.width) for level in scene.grids]
        return [torch.randn(*x, generator=generator).relu().to(device) for x in shapes]

    sizes = torch.tensor([size], device=device, dtype=torch.float32)
    pairs = {
        name: [
            Pair(f"p{i}", level.stride, student.requires_grad_(), teacher, sizes)
            for i, (level, student, teacher) in enumerate(
                zip(scene.grids, tower(), tower(), strict=True), start=3
            )
        ]
        for name in ("cls", "reg")
    }
    counts = [level.height * level.width for level in scene.grids]
    predictions = DensePredictions(
        logits=list(scene.logits[:1].split(counts, dim=1)),
        boxes=list(scene.boxes[:1].split(counts, dim=1)),
        strides=[level.stride for level in scene.grids],
        sizes=[(level.height, level.width) for level in scene.grids],
        offset=scene.grids[0].offset,
    )
    targets = Targets(
        boxes=[scene.gt_boxes[0]],
        classes=[scene.gt_classes[0]],
        image_sizes=[size],
        ignored=[torch.zeros(0, 4)],
    )
    step = Step(pairs, {"predictions": predictions}, targets)
    students = [pair.student for tower_pairs in pairs.values() for pair in tower_pairs]
    distiller = PGD()
    return lambda: torch.autograd.grad(sum(distiller(step).values()), students)


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
