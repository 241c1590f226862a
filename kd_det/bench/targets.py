"""
Assigning the ground truth of dense detectors, beside loops over boxes.

For ATSS (GFL's assignment too), AutoAssign, DDOD, RepPoints and FSAF: from the predictions and
objects of two images to what each position has to predict, as the detectors do it in training, for
all boxes at once, and box by box. Both compute the same, which is checked first. Times are CPU time
of all threads, on a GPU wall time; what is compared runs side by side in every round, so that
ratios hold on a busy machine too.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from kd_det.bench import targets_loops, targets_scene
from kd_det.bench.measure import device_name, peak_bytes, ratio, take_turns
from kd_det.bench.options import add_options
from kd_det.bench.pgd_scene import CLASSES, pyramid
from kd_det.bench.targets_scene import Assigned
from kd_det.functional.level_grid import count_positions

Assign = Callable[[Assigned], list[Tensor]]
DETECTORS = ("atss", "autoassign", "ddod", "reppoints", "fsaf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(
        parser,
        size=(800, 1333),
        size_help="image size in pixels",
        rounds=5,
        rounds_help="measurements of each",
        quick_help="tiny images, few boxes, one round",
    )
    parser.add_argument(
        "--boxes",
        type=int,
        nargs="+",
        default=(1, 10, 100),
        metavar="M",
        help="ground-truth boxes per image (default: 1 10 100)",
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run with the options of `add_arguments`, print a table, and return what `run` does."""
    size, counts, rounds = tuple(args.size), list(args.boxes), args.rounds
    if args.quick:
        size, counts, rounds = (96, 128), [1, 10], 1
    report = run(device=args.device, size=size, counts=counts, rounds=rounds)
    print(tabulate(report["rows"], headers="keys", floatfmt=".3g"))
    return report


def run(*, device: str, size: tuple[int, int], counts: list[int], rounds: int) -> dict[str, Any]:
    """
    Measure all detectors.

    Args:
        device: "cpu" or "cuda".
        size: of the images (height, width) in pixels.
        counts: boxes per image.
        rounds: measurements of each.

    Returns:
        Setting; `rows`, one per detector and number of boxes: median milliseconds of both, how many
        times as long the loop takes (median over rounds), peak extra memory in MB; `seconds` of
        every round.

    Raises:
        AssertionError: both do not compute the same.
    """
    grids = pyramid(size)
    scenes = {count: Assigned.random(grids, size, count, device) for count in counts}
    runs: dict[tuple[str, int, str], Callable[[], list[Tensor]]] = {
        (name, count, way): partial(getattr(module, name), scene)
        for name in DETECTORS
        for count, scene in scenes.items()
        for way, module in (("batched", targets_scene), ("loop", targets_loops))
    }
    cases = [(name, count) for name in DETECTORS for count in counts]
    with torch.no_grad():
        for name, count in cases:
            both = (runs[name, count, way]() for way in ("batched", "loop"))
            for found, expected in zip(*both, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        seconds = take_turns(runs, rounds, device, clock="cpu")
        rows = [_row(*case, runs, seconds, device) for case in cases]
    return {
        "device": device_name(device),
        "size": size,
        "positions": count_positions(grids),
        "images": 2,
        "classes": CLASSES,
        "rounds": rounds,
        "rows": rows,
        "seconds": {f"{name} {count} {way}": x for (name, count, way), x in seconds.items()},
    }


def _row(
    name: str,
    count: int,
    runs: dict[tuple[str, int, str], Callable[[], list[Tensor]]],
    seconds: dict[tuple[str, int, str], list[float]],
    device: str,
) -> dict[str, Any]:
    batched, loop = ((name, count, way) for way in ("batched", "loop"))
    return {
        "detector": name,
        "boxes": count,
        "batched_ms": 1e3 * median(seconds[batched]),
        "loop_ms": 1e3 * median(seconds[loop]),
        "speedup": ratio(seconds[loop], seconds[batched]),
        "batched_mb": peak_bytes(runs[batched], device) / 1e6,
        "loop_mb": peak_bytes(runs[loop], device) / 1e6,
    }
