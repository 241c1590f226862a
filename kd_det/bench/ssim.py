"""
SSIM between feature maps, forward and backward, beside other libraries.

Every library computes the loss of the method: min-max per channel, SSIM with an 11 x 11 Gaussian
window, (1 - SSIM) / 2, gradient for the student, on the pyramid p3..p7 of a RetinaNet. kornia has a
min-max of its own; the others are image metrics and get `min_max_normalize`. Libraries take turns
in every round, so that ratios hold on a busy machine too. What a library computes is compared with
this package's loss in float64 under the same border rule.
"""

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from kd_det.bench.measure import device_name, kept_bytes, peak_bytes, take_turns
from kd_det.bench.options import add_options
from kd_det.bench.ssim_libraries import OWN, Library, Loss, load_libraries
from kd_det.functional.ssim import SSIMOptions, ssim_loss

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
# Both maps are read for the min-max and again for SSIM, the gradient is written, read and scaled.
FLOOR_MAPS = 7
PEAK_MEMORY = {
    "cpu": "events of torch's CPU allocator",
    "cuda": "torch.cuda.max_memory_allocated",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(
        parser,
        size=(800, 1344),
        size_help="padded image size in pixels",
        rounds=5,
        rounds_help="measurements of each",
        quick_help="small maps, two rounds",
    )
    parser.add_argument("--images", type=int, default=2, help="images per batch (default: 2)")
    parser.add_argument("--channels", type=int, default=256, help="channels (default: 256)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run with the options of `add_arguments`, print two tables, and return what `run` does."""
    size, channels, rounds = tuple(args.size), args.channels, args.rounds
    if args.quick:
        size, channels, rounds = (128, 192), 8, 2
    report = run(
        device=args.device, size=size, images=args.images, channels=channels, rounds=rounds
    )
    for name in ("p3", "pyramid"):
        rows = [{"library": key} | row for key, row in report[name].items()]
        print(f"\n{name}, forward and backward; x: {OWN} = 1, on the same levels")
        print(tabulate(rows, headers="keys", floatfmt=".3g"))
    for failure in report["failures"]:
        print("{library} cannot run {level}: {error}".format(**failure))
    return report


def run(
    *, device: str, size: tuple[int, int], images: int, channels: int, rounds: int
) -> dict[str, Any]:
    """
    Measure all libraries.

    Args:
        device: "cpu" or "cuda".
        size: padded image size (height, width) in pixels.
        images: images per batch.
        channels: channels of every level.
        rounds: measurements of each time.

    Returns:
        Setting, versions, `levels` with the seconds of every round, one row per library for `p3`
        and for the whole `pyramid` (medians over rounds of the time summed over the levels that the
        library can run, and of its ratio to this package on the same levels; peak memory with the
        gradients; maps kept for the backward pass; largest errors), `failures`, and the time that
        memory traffic alone would take (`floor`).

    Raises:
        ModuleNotFoundError: a library is not installed.
    """
    libraries = load_libraries()
    levels = {
        name: random_pair((images, channels, *(math.ceil(x / s) for x in size)), device)
        for name, s in STRIDES.items()
    }
    failures, accuracy = check(libraries, levels)
    failed = {(failure["library"], failure["level"]) for failure in failures}
    runs = {
        (name, level): partial(forward_backward, library.loss, [pair])
        for level, pair in levels.items()
        for name, library in libraries.items()
        if (name, level) not in failed
    }
    seconds = take_turns(runs, rounds, device)
    report: dict[str, Any] = {
        "device": device_name(device),
        "shapes": {name: list(pair[0].shape) for name, pair in levels.items()},
        "rounds": rounds,
        "versions": {name: library.version for name, library in libraries.items()},
        "peak_memory": PEAK_MEMORY["cpu" if device == "cpu" else "cuda"],
        "failures": failures,
        "accuracy": accuracy,
        "levels": {
            level: {name: seconds[name, level] for name in libraries if (name, level) in seconds}
            for level in levels
        },
    }
    for title, names in (("p3", ["p3"]), ("pyramid", list(levels))):
        chosen = {name: levels[name] for name in names}
        report[title] = table(title, libraries, chosen, seconds, accuracy)
    report["floor"] = bandwidth_floor(levels, device)
    return report


def random_pair(shape: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Draw a student map that requires a gradient, and a teacher map correlated with it."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(*shape, generator=generator)
    student = 2 * teacher + torch.randn(*shape, generator=generator)
    return student.to(device).requires_grad_(), teacher.to(device)


def forward_backward(loss: Loss, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Return the gradients of the loss summed over levels, as a training step would need them."""
    total = torch.stack([loss(student, teacher) for student, teacher in pairs]).sum()
    return torch.autograd.grad(total, [student for student, _ in pairs])


def check(
    libraries: Mapping[str, Library], levels: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[list[dict[str, str]], dict[str, dict[str, dict[str, float]]]]:
    """
    Run every library once on every level.

    Returns:
        What failed, a warning about the result included; and per library and level the error of the
        loss and the relative error of the gradient, against float64 under the same border rule.
    """
    failures: list[dict[str, str]] = []
    accuracy: dict[str, dict[str, dict[str, float]]] = {name: {} for name in libraries}
    for level, (student, teacher) in tqdm(levels.items(), desc="accuracy"):
        wide = student.detach().double().requires_grad_(), teacher.double()
        exact: dict[str, tuple[Tensor, Tensor]] = {}
        for name, library in libraries.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    value = library.loss(student, teacher)
                    (grad,) = torch.autograd.grad(value, student)
            except Exception as error:  # a library may raise anything on a map it cannot take
                failures.append({"library": name, "level": level, "error": str(error)})
                continue
            if library.border not in exact:
                loss = ssim_loss(*wide, SSIMOptions(border=library.border))
                exact[library.border] = loss.detach(), torch.autograd.grad(loss, wide[0])[0]
            true_value, true_grad = exact[library.border]
            accuracy[name][level] = {
                "value_error": (value - true_value).abs().item(),
                "grad_error": ((grad - true_grad).norm() / true_grad.norm()).item(),
            }
    return failures, accuracy


def table(
    title: str,
    libraries: Mapping[str, Library],
    levels: Mapping[str, tuple[Tensor, Tensor]],
    seconds: Mapping[tuple[str, str], list[float]],
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """Return a row for each library that can run any of some levels."""
    rows = {
        name: row(name, library.loss, levels, seconds, accuracy)
        for name, library in tqdm(libraries.items(), desc=f"memory {title}")
    }
    return {name: entry for name, entry in rows.items() if entry}


def row(
    name: str,
    loss: Loss,
    levels: Mapping[str, tuple[Tensor, Tensor]],
    seconds: Mapping[tuple[str, str], list[float]],
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, float]:
    """Return what was measured of a library on those of some levels it can run; empty for none."""
    ran = [level for level in levels if (name, level) in seconds]
    if not ran:
        return {}
    errors = [accuracy[name][level] for level in ran]
    device = str(levels[ran[0]][0].device)
    return {
        "levels": len(ran),
        **times(seconds, name, ran),
        **memory(loss, [levels[level] for level in ran], device),
        **{key: max(error[key] for error in errors) for key in errors[0]},
    }


def times(
    seconds: Mapping[tuple[str, str], list[float]], name: str, levels: Sequence[str]
) -> dict[str, float]:
    """Return the median time of a library over some levels, and its ratio to this package's."""
    theirs, ours = (
        [sum(turn) for turn in zip(*(seconds[key, level] for level in levels), strict=True)]
        for key in (name, OWN)
    )
    return {
        "ms": 1e3 * median(theirs),
        "x": median(a / b for a, b in zip(theirs, ours, strict=True)),
    }


def memory(loss: Loss, pairs: Sequence[tuple[Tensor, Tensor]], device: str) -> dict[str, float]:
    """Return the peak with the gradients in MB, and what is kept for the backward pass in maps."""
    one_map = sum(student.numel() * student.element_size() for student, _ in pairs)
    run = partial(forward_backward, loss, pairs)
    return {
        "peak_mb": peak_bytes(run, device) / 1e6,
        "kept_maps": kept_bytes(run, [x for pair in pairs for x in pair]) / one_map,
    }


def bandwidth_floor(levels: Mapping[str, tuple[Tensor, Tensor]], device: str) -> dict[str, float]:
    """Return the time that the traffic no implementation can avoid takes at the speed of a copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    (seconds,) = take_turns({("copy", ""): copy}, 5, device).values()
    rate = 2 * source.numel() * source.element_size() / min(seconds)
    one_map = {name: x.numel() * x.element_size() for name, (x, _) in levels.items()}
    return {
        "copy_gb_per_s": rate / 1e9,
        "maps": FLOOR_MAPS,
        "p3_ms": 1e3 * FLOOR_MAPS * one_map["p3"] / rate,
        "pyramid_ms": 1e3 * FLOOR_MAPS * sum(one_map.values()) / rate,
    }
