"""
Pictures of what a distiller looks at, on images of a config's test set.

PGD: the teacher's importance of every position, per level, for both towers. SSIM: the structural
similarity of student and teacher, per level, for two checkpoints of the student.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.detection_utils import convert_image_to_rgb
from torch import Tensor

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import is_distillation, load_config
from kd_det.data import CheckedDatasetMapper, register_from_config
from kd_det.distillation import DistillationDetector
from kd_det.distillers import PGD, SSIM, Step
from kd_det.engine.trainer import DistillationTrainer
from kd_det.experiments.overlay import draw_grid


def draw_importance(
    config_file: str, opts: Sequence[str], *, out: Path, images: int, skip: int
) -> None:
    """
    Draw what PGD's teacher finds important.

    Args:
        config_file, opts: of a run with PGD, and overrides KEY VALUE.
        out: PNG file to write.
        images, skip: how many images of the test set, after how many.

    Raises:
        ValueError: the config has no PGD.
    """
    cfg = load_config(config_file, opts)
    model = _build(cfg, "PGD")
    batch = _load_images(cfg, skip, images)
    _draw(batch, _importance(model, batch), cfg, out)


def draw_similarity(
    config_file: str,
    opts: Sequence[str],
    checkpoints: Mapping[str, str],
    *,
    out: Path,
    images: int,
    skip: int,
) -> None:
    """
    Draw how similar the SSIM distiller finds student and teacher.

    Args:
        config_file, opts: of a run with SSIM, and overrides KEY VALUE.
        checkpoints: title -> checkpoint of the student.
        out: PNG file to write.
        images, skip: how many images of the test set, after how many.

    Raises:
        ValueError: the config has no SSIM, or adapters between the models.
    """
    cfg = load_config(config_file, opts)
    model = _build(cfg, "SSIM")
    batch = _load_images(cfg, skip, images)
    _draw(batch, _similarity(model, batch, checkpoints, cfg), cfg, out)


def _draw(
    batch: list[dict[str, Any]],
    columns: dict[str, tuple[Tensor, float]],
    cfg: CfgNode,
    out: Path,
) -> None:
    pictures = [_picture(item, cfg) for item in batch]
    boxes = [item["instances"].gt_boxes.tensor for item in batch]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(pictures, boxes, columns, out)


def _build(cfg: CfgNode, distiller: str) -> DistillationDetector:
    if not is_distillation(cfg) or distiller not in cfg.KD.DISTILLERS:
        raise ValueError(
            f"The config's KD.DISTILLERS is {cfg.KD.DISTILLERS}; give the config of a run with "
            f"{distiller}."
        )
    register_from_config(cfg.KD.DATASETS)
    return cast(DistillationDetector, DistillationTrainer.build_model(cfg).eval())


def _load_images(cfg: CfgNode, skip: int, count: int) -> list[dict[str, Any]]:
    """Return test images with their ground truth, as the models load them."""
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST)[skip : skip + count]
    mapper = CheckedDatasetMapper(cfg, is_train=False)
    # The test mapper drops the ground truth unless it thinks that it trains.
    mapper.is_train = True
    return [mapper(record) for record in records]


def _picture(item: dict[str, Any], cfg: CfgNode) -> Any:
    return convert_image_to_rgb(item["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)


@torch.no_grad()
def _step(model: DistillationDetector, batch: list[dict[str, Any]], name: str) -> Step:
    """Return what a distiller sees of a batch."""
    return model.observe(batch).steps[name]


def _importance(
    model: DistillationDetector, batch: list[dict[str, Any]]
) -> dict[str, tuple[Tensor, float]]:
    """Return per column one (N, H, W) map in [0, 1] and its stride."""
    distiller = cast(PGD, model.active["PGD"].distiller)
    step = _step(model, batch, "PGD")
    predictions = step.teacher["predictions"]
    masks = distiller.masks(predictions, step.targets)
    columns = {}
    for name, maps in (("classification", masks.cls), ("regression", masks.reg)):
        levels = [
            (x, stride) for x, stride in zip(maps, predictions.strides, strict=True) if x.any()
        ]
        columns.update({f"{name}, stride {stride:g}": (x, stride) for x, stride in levels})
    return columns


def _similarity(
    model: DistillationDetector,
    batch: list[dict[str, Any]],
    checkpoints: Mapping[str, str],
    cfg: CfgNode,
) -> dict[str, tuple[Tensor, float]]:
    """Return per column the channels' mean SSIM, (N, H, W) clipped to [0, 1], and its stride."""
    columns = {}
    active = model.active["SSIM"]
    distiller = cast(SSIM, active.distiller)
    if any(True for _ in active.adapters.parameters()):
        raise ValueError(
            "This config has adapters between student and teacher, which a student trained alone "
            "has not; give a config whose student has the teacher's channels."
        )
    for when, path in checkpoints.items():
        KDCheckpointer(model, cfg.OUTPUT_DIR).load_student(path, strict=True)
        for pair in _step(model, batch, "SSIM").pairs[distiller.spec.name]:
            values = distiller.similarity(pair).mean(1).clamp(0, 1)
            columns[f"{when}, stride {pair.stride:g}"] = (values, pair.stride)
    # The two checkpoints' maps of a level side by side.
    order = sorted(columns, key=lambda name: float(name.rsplit(" ", 1)[1]))
    return {name: columns[name] for name in order}
