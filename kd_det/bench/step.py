"""
What each distiller adds to a student's training step.

A GFL R50-FPN teaches a GFL R18-FPN, stem and first stage frozen, both of random weights, with every
distiller's default options. Timed is all of a distiller but its weight: matching levels, adapters,
decoding, the loss, and the gradient of the student's captured outputs and of its own parameters;
not the pass of the teacher, which is a row of its own. The measure is the student's forward and
backward pass on the same batch. Times are CPU time of all threads, on a GPU wall time; everything
takes turns in every round, so that shares hold on a busy machine too.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

import kd_det.modeling  # noqa: F401  registers GFL
from kd_det.bench.measure import device_name, peak_bytes, ratio, take_turns
from kd_det.bench.options import add_options
from kd_det.bench.pgd_scene import CLASSES, random_boxes
from kd_det.config import add_kd_config
from kd_det.distillation.active import ActiveDistiller
from kd_det.distillation.batch import Frame, targets_of
from kd_det.distillation.capture import CapturePath, Captures
from kd_det.distillation.detector import DistillationDetector
from kd_det.distillation.teacher import Teacher
from kd_det.distillers import build_distiller

DISTILLERS = (
    *("PKD", "CWD", "FRS", "BCKD", "LD", "CrossKD", "MGD", "FGD"),
    *("SSIM", "PGD", "FeatureLp"),
)
STUDENT, TEACHER = "student", "teacher"
Batch = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(
        parser,
        size=(512, 512),
        size_help="image size in pixels",
        rounds=5,
        rounds_help="measurements of each",
        quick_help="small images and models, one round",
    )
    parser.add_argument("--images", type=int, default=2, help="images per batch (default: 2)")
    parser.add_argument("--boxes", type=int, default=10, help="objects per image (default: 10)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run with the options of `add_arguments`, print a table, and return what `run` does."""
    size, rounds, depths, channels = tuple(args.size), args.rounds, (18, 50), 256
    if args.quick:
        size, rounds, depths, channels = (128, 192), 1, (18, 18), 16
    report = run(
        device=args.device,
        size=size,
        images=args.images,
        boxes=args.boxes,
        rounds=rounds,
        depths=depths,
        channels=channels,
    )
    print(tabulate(report["rows"], headers="keys", floatfmt=".3g"))
    return report


def run(
    *,
    device: str,
    size: tuple[int, int],
    images: int,
    boxes: int,
    rounds: int,
    depths: tuple[int, int] = (18, 50),
    channels: int = 256,
) -> dict[str, Any]:
    """
    Measure all distillers.

    Args:
        device: "cpu" or "cuda".
        size: of the images (height, width) in pixels.
        images: per batch.
        boxes: objects per image.
        rounds: measurements of each.
        depths: of the student's and the teacher's ResNet.
        channels: of both pyramids.

    Returns:
        Setting; `rows`, one for the student's step, one for the teacher's pass, one per distiller:
        median milliseconds, share (median over rounds of the ratio to the student's step), peak
        memory beside what is there in MB, trained parameters; `seconds` of every round.
    """
    torch.manual_seed(0)
    batch = random_batch(size, images, boxes)
    model = distillation(device, depths, channels, batch)
    runs: dict[str, Callable[[], Any]] = {
        STUDENT: partial(train, model.student, batch),
        TEACHER: partial(watch_teacher, model, batch),
    }
    runs |= added(model, batch)
    seconds = take_turns(runs, rounds, device, clock="cpu")
    modules: Mapping[str, nn.Module] = {STUDENT: model.student, **model.active}
    return {
        "device": device_name(device),
        "student": f"GFL R{depths[0]}-FPN",
        "teacher": f"GFL R{depths[1]}-FPN",
        "channels": channels,
        "size": size,
        "images": images,
        "boxes": boxes,
        "rounds": rounds,
        "rows": [
            {
                "part": name,
                "ms": 1e3 * median(seconds[name]),
                "share": ratio(seconds[name], seconds[STUDENT]),
                "peak_mb": peak_bytes(runs[name], device) / 1e6,
                "parameters": count_parameters(modules[name]) if name in modules else 0,
            }
            for name in runs
        ],
        "seconds": seconds,
    }


def gfl_cfg(device: str, depth: int, channels: int) -> CfgNode:
    """Return the config of a GFL on P3..P7 of a ResNet-FPN, as configs/base has it."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    cfg.MODEL.DEVICE = device
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH, resnet.NORM = depth, "BN"
    resnet.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    resnet.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.TOP_BLOCK = "p6p7_p5"
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    return cfg


def distillation(
    device: str, depths: tuple[int, int], channels: int, batch: Batch
) -> DistillationDetector:
    """Build a student and its teacher, watched by all distillers at once."""
    student, teacher = (build_model(gfl_cfg(device, depth, channels)) for depth in depths)
    # Without statistics of its own the teacher's numbers would grow from block to block.
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad(), EventStorage():
        teacher.train()(batch)
    cfg = gfl_cfg(device, depths[0], channels)
    return DistillationDetector(
        student=student.train(),
        teacher=Teacher(teacher),
        distillers={name: build_distiller(name, cfg) for name in DISTILLERS},
    ).to(device)


def random_batch(size: tuple[int, int], images: int, boxes: int) -> Batch:
    """Draw images of noise with objects from 16 pixels to half of the image."""
    generator = torch.Generator().manual_seed(0)
    batch: Batch = []
    for corners in random_boxes(size, images, boxes, generator):
        classes = torch.randint(0, CLASSES, (boxes,), generator=generator)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        instances = Instances(size, gt_boxes=Boxes(corners), gt_classes=classes)
        batch.append({"image": image, "instances": instances})
    return batch


def train(student: nn.Module, batch: Batch) -> None:
    """Run the student's forward and backward pass."""
    with EventStorage():
        sum(student(batch).values()).backward()
    student.zero_grad()


def watch_teacher(model: DistillationDetector, batch: Batch) -> Captures:
    """Run the teacher as far as the last distiller looks."""
    assert model.teacher is not None
    return model.teacher(batch, model.watch.teacher, model.watch.stop_after)


def added(model: DistillationDetector, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Run both models once; return what each distiller does with what was captured."""
    teacher = watch_teacher(model, batch)
    with EventStorage(), model.watch.student.record() as captures:
        model.student(batch)
    student = Captures()
    for name in dict.fromkeys(captures.order):
        for output in captures.get(CapturePath(name)):
            student.add(name, leaves(output))

    def distil(active: ActiveDistiller) -> tuple[Tensor | None, ...]:
        targets = targets_of(batch)
        frame = Frame.of(targets.image_sizes, model.device, model.student)
        step = active.step(student, teacher, targets, frame)
        total = torch.stack(list(active.distiller(step).values())).sum()
        wanted = [*step.features, *active.parameters()]
        return torch.autograd.grad(total, wanted, allow_unused=True)

    return {name: partial(distil, active) for name, active in model.active.items()}


def leaves(output: Any) -> Any:
    """Return a module's output with every tensor a leaf, so that gradients end there."""
    if isinstance(output, Tensor):
        return output.detach().requires_grad_()
    if isinstance(output, dict):
        return {key: leaves(value) for key, value in output.items()}
    return [leaves(value) for value in output]


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
