"""
PGD's quality scores and importance maps, and its losses beside a training step.

Targets (quality, selection, fit, masks) are timed against a loop over images and boxes written from
the formulas, vectorised over positions; the whole distiller, targets included, forward and
backward, against one training step of the student it would guide, an FCOS R50-FPN. Times are CPU
time of all threads, on a GPU wall time; what is compared runs side by side in every round, so that
ratios hold on a busy machine too.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from kd_det.bench.measure import device_name, peak_bytes, ratio, take_turns
from kd_det.bench.options import add_options
from kd_det.bench.pgd_scene import (
    CHANNELS,
    CLASSES,
    EXPONENTS,
    TOP_K,
    Scene,
    looped_targets,
    pyramid,
    student_step,
)
from kd_det.distillers.base import Pair, Step, Targets
from kd_det.distillers.pgd import PGD
from kd_det.distillers.predictions import DensePredictions
from kd_det.functional.gaussian_importance import ImportanceOptions, importance_maps
from kd_det.functional.level_grid import (
    Grid,
    count_positions,
    positions_in_boxes,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(
        parser,
        size=(800, 1333),
        size_help="image size in pixels",
        rounds=3,
        rounds_help="measurements of each",
        quick_help="tiny images, few boxes, a small student, one round",
    )
    parser.add_argument(
        "--boxes",
        type=int,
        nargs="+",
        default=(1, 10, 100, 500),
        metavar="M",
        help="ground-truth boxes per image (default: 1 10 100 500)",
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
