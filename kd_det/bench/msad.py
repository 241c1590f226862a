"""
What a low-resolution student saves as a whole model.

Three FCOS R50-FPN are compared at each width of configs/coco/msad: the full image on P3..P7, MSAD's
aligned student (half the image, P2..P6, so the head works on the full model's grid) and the plain
low-resolution model (half the image, P3..P7). Counted and timed is a forward pass of backbone, FPN
and head on one image; padding, box decoding and non-maximum suppression are not part of it.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import kd_det.modeling  # noqa: F401  registers FCOS and its backbone
from kd_det.bench.measure import device_name, ratio, take_turns
from kd_det.bench.options import add_options
from kd_det.config import add_kd_config

FACTOR = 2
# Factor of the image, and whether the pyramid starts at P2.
MODELS = {"full": (1, False), "aligned": (FACTOR, True), "plain": (FACTOR, False)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(
        parser,
        size=(832, 1344),
        size_help="padded size of the full image in pixels, multiples of 64",
        rounds=3,
        rounds_help="latency measurements of each; 0 counts multiply-adds only",
        quick_help="a small image, two widths, one round",
    )
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=(1.0, 0.75, 0.5, 0.25),
        metavar="W",
        help="widths of the ResNet (default: 1 0.75 0.5 0.25)",
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run with the options of `add_arguments`, print a table, and return what `run` does."""
    size, widths, rounds = tuple(args.size), list(args.widths), args.rounds
    if args.quick:
        size, widths, rounds = (64, 128), [0.5, 0.25], min(rounds, 1)
    report = run(device=args.device, size=size, widths=widths, rounds=rounds)
    print(tabulate(report["rows"], headers="keys", floatfmt=".3g"))
    return report


def run(*, device: str, size: tuple[int, int], widths: list[float], rounds: int) -> dict[str, Any]:
    """
    Count and time all models.

    Args:
        device: "cpu" or "cuda".
        size: padded size (height, width) of the full image in pixels.
        widths: factors of the ResNet's widths.
        rounds: measurements of each latency, in turn; 0: none.

    Returns:
        Setting; `rows`, one per width and model: 1e9 multiply-adds (`gmac`, counted by fvcore) of
        the whole model and of its ResNet without FPN, median milliseconds of a forward pass, and
        each one's ratio to the full model's (of the same width); `seconds` of every round.

    Raises:
        ValueError: a side is no multiple of 64.
    """
    if any(side % (32 * FACTOR) for side in size):
        raise ValueError(f"--size {size[0]} {size[1]}: both must be multiples of {32 * FACTOR}.")
    networks = {
        (width, name): Network(fcos_cfg(width, finest_p2=finest_p2)).to(device)
        for width in widths
        for name, (_, finest_p2) in MODELS.items()
    }
    images = {
        name: torch.zeros(1, 3, *(side // factor for side in size), device=device)
        for name, (factor, _) in MODELS.items()
    }
    counts = {
        key: count_gmac(network, images[key[1]])
        for key, network in tqdm(networks.items(), desc="multiply-adds")
    }
    seconds: dict[tuple[float, str], list[float]] = {}
    if rounds:
        runs = {key: partial(network, images[key[1]]) for key, network in networks.items()}
        with torch.inference_mode():
            seconds = take_turns(runs, rounds, device)
    rows = [_row(*key, counts, seconds) for key in networks]
    return {
        "device": device_name(device),
        "size": size,
        "rounds": rounds,
        "rows": rows,
        "seconds": {f"{name} {width:g}": values for (width, name), values in seconds.items()},
    }


def _row(
    width: float,
    name: str,
    counts: Mapping[tuple[float, str], tuple[float, float]],
    seconds: Mapping[tuple[float, str], list[float]],
) -> dict[str, Any]:
    """Return what was counted and, unless nothing was, timed of one model."""
    whole, resnet = counts[width, name]
    full_whole, full_resnet = counts[width, "full"]
    row = {
        "width": width,
        "model": name,
        "gmac": whole,
        "ratio": whole / full_whole,
        "resnet_gmac": resnet,
        "resnet_ratio": resnet / full_resnet,
    }
    if seconds:
        own = seconds[width, name]
        row |= {"ms": 1e3 * median(own), "ms_ratio": ratio(own, seconds[width, "full"])}
    return row


class Network(nn.Module):
    """Backbone and head of a dense detector, from padded images to the head's outputs."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        detector = build_model(cfg).eval()
        self.backbone = detector.backbone
        self.head = detector.head
        self._levels = detector.head_in_features

    def forward(self, images: Tensor) -> Any:
        """Return what the head predicts for (N, 3, H, W)."""
        features = self.backbone(images)
        return self.head([features[level] for level in self._levels])


def fcos_cfg(width: float, *, finest_p2: bool) -> CfgNode:
    """
    Return the config of an FCOS R50-FPN as configs/coco/msad has it.

    Args:
        width: factor of the ResNet's widths.
        finest_p2: the pyramid is P2..P6, otherwise P3..P7.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH = 50
    resnet.NORM = "BN"
    resnet.STEM_OUT_CHANNELS = resnet.WIDTH_PER_GROUP = round(64 * width)
    resnet.RES2_OUT_CHANNELS = round(256 * width)
    first = 2 if finest_p2 else 3
    resnet.OUT_FEATURES = [f"res{i}" for i in range(first, 6)]
    cfg.MODEL.FPN.IN_FEATURES = resnet.OUT_FEATURES
    cfg.MODEL.FPN.TOP_BLOCK = "p6_c5" if finest_p2 else "p6p7_c5"
    cfg.MODEL.FCOS.IN_FEATURES = [f"p{i}" for i in range(first, first + 5)]
    return cfg


def count_gmac(network: Network, images: Tensor) -> tuple[float, float]:
    """Return the 1e9 multiply-adds of a forward pass: of the network, and of its ResNet."""
    counter = FlopCountAnalysis(network, images)
    # What fvcore has no rule for is element-wise; what is never called costs nothing.
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = counter.by_module()
    return by_module[""] / 1e9, by_module["backbone.bottom_up"] / 1e9
