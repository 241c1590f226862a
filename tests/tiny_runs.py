"""Tiny detectors, data and config files, from which tests build whole runs that take a second."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image, ImageDraw

from kd_det.config import load_config, student_cfg
from kd_det.data import CheckedDatasetMapper, register_from_config
from kd_det.engine.trainer import DistillationTrainer

BASE = Path(__file__).parents[1] / "configs" / "base"
DATA = "tiny_coco"
META = {
    "fcos": "FCOS",
    "retinanet": "RetinaNet",
    "faster_rcnn": "GeneralizedRCNN",
    "mask_rcnn": "GeneralizedRCNN",
    "keypoint_rcnn": "GeneralizedRCNN",
}
# Detectors of kd_det's own, beside those that most tests go through.
MORE_META = {
    "atss": "ATSS",
    "gfl": "GFL",
    "autoassign": "AutoAssign",
    "ddod": "DDOD",
    "fsaf": "FSAF",
    "reppoints": "RepPoints",
}
_KEYPOINTS = ["top", "left", "right"]

# Nets of 8 to 64 channels on images of 64 to 96 pixels, from random weights.
_SHRINK: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FCOS.NUM_CLASSES": 2,
    "MODEL.FCOS.NUM_CONVS": 1,
    "MODEL.FCOS.NORM": "",
    **{f"MODEL.{name.upper()}.NUM_CLASSES": 2 for name in MORE_META.values()},
    **{f"MODEL.{name.upper()}.NUM_CONVS": 2 for name in MORE_META.values()},
    **{f"MODEL.{name.upper()}.NORM": "" for name in MORE_META.values()},
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(_KEYPOINTS),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
    "INPUT.MIN_SIZE_TRAIN": [0],
    "INPUT.MIN_SIZE_TEST": 0,
    "DATASETS.TRAIN": [DATA],
    "DATASETS.TEST": [],
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.STEPS": [],
    "SOLVER.MAX_ITER": 3,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "SEED": 7,
}
_R50 = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 48,
}


@dataclass(frozen=True)
class TinyTeacher:
    """A config file and a checkpoint of random weights that fits it."""

    config_file: Path
    weights: Path

    def keys(self) -> dict[str, Any]:
        """What a student's config says about this teacher."""
        return {
            "KD.TEACHER.CONFIG_FILE": str(self.config_file),
            "KD.TEACHER.WEIGHTS": str(self.weights),
        }


def make_data(
    folder: Path,
    *,
    images: int = 8,
    name: str = DATA,
    sizes: Sequence[tuple[int, int]] = ((80, 96), (96, 64)),
) -> dict[str, str]:
    """Draw a COCO-format set with boxes, polygons and keypoints; return its KD.DATASETS entry."""
    rng = np.random.default_rng(3)
    (folder / "images").mkdir(parents=True)
    records, annotations = [], []
    for i in range(images):
        width, height = sizes[i % len(sizes)]
        canvas = Image.fromarray(rng.integers(0, 60, (height, width, 3), dtype=np.uint8))
        for k in range(2):
            x, y = (int(rng.integers(2, side // 2)) for side in (width, height))
            w, h = (int(rng.integers(16, 30)) for _ in range(2))
            ImageDraw.Draw(canvas).rectangle((x, y, x + w, y + h), fill=(200, 90 * k, 40))
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            points = [x + w / 2, y + 1, 2, x + 1, y + h / 2, 2, x + w - 1, y + h / 2, 1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": 1 + k,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [corners],
                    "keypoints": points,
                    "num_keypoints": len(_KEYPOINTS),
                }
            )
        canvas.save(folder / "images" / f"{i}.png")
        records.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
    categories = [{"id": i + 1, "name": n, "keypoints": _KEYPOINTS} for i, n in enumerate("ab")]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    return {"name": name, "json": str(folder / "data.json"), "images": str(folder / "images")}


def register_data(folder: Path) -> dict[str, str]:
    """Make the data that all tiny configs train on, and register it."""
    entry = make_data(folder)
    register_from_config([entry])
    return entry


def _levels(detector: str) -> dict[str, Any]:
    if detector == "retinanet":
        sides = [8, 16, 32, 64, 128]
        return {"MODEL.ANCHOR_GENERATOR.SIZES": [[s, s * 1.26, s * 1.59] for s in sides]}
    if detector.endswith("rcnn"):
        return {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]]}
    return {}


def write_config(path: Path, detector: str, keys: Mapping[str, Any], *, r50: bool = False) -> Path:
    """Write the yaml of a tiny detector on top of its file in configs/base."""
    flat = {**_SHRINK, **(_R50 if r50 else {}), **_levels(detector)}
    flat |= {"OUTPUT_DIR": str(path.with_suffix("")), **keys}
    nested: dict[str, Any] = {"_BASE_": str(BASE / f"{detector}_r50_fpn.yaml")}
    for key, value in flat.items():
        node = nested
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path.write_text(yaml.safe_dump(nested))
    return path


def distil_keys(detector: str, teacher: TinyTeacher | None, **keys: Any) -> dict[str, Any]:
    """Config keys that wrap a tiny detector as a student."""
    out = {
        "MODEL.META_ARCHITECTURE": "DistillationDetector",
        "KD.STUDENT.META_ARCHITECTURE": {**META, **MORE_META}[detector],
        "KD.DISTILLERS": ["FeatureLp"] if teacher else [],
        # Maps of random weights are large; beside this the detection losses still count.
        "KD.FEATURE_LP.WEIGHT": 0.001,
        "KD.GRAD_SHARE_PERIOD": 0,
    }
    return {**out, **(teacher.keys() if teacher else {}), **keys}


def save_random_weights(cfg: CfgNode, path: Path, seed: int = 11) -> Path:
    """Write a stock checkpoint of random weights for the model that a config names."""
    seed_all_rng(seed)
    model = build_model(student_cfg(cfg))
    # Statistics that differ from the initial ones, so that tests notice when they move.
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    torch.save({"model": model.state_dict()}, path)
    return path


def make_teacher(folder: Path, detector: str, **keys: Any) -> TinyTeacher:
    """Write a tiny R50 teacher: its config and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder / f"{detector}_teacher.yaml", detector, keys, r50=True)
    weights = save_random_weights(load_config(str(config)), folder / f"{detector}.pth")
    return TinyTeacher(config, weights)


def batch_of(cfg: CfgNode, records: list[dict[str, Any]], count: int = 2) -> list[dict[str, Any]]:
    """Return model inputs for the first records of a data set, always the same."""
    seed_all_rng(5)
    mapper = CheckedDatasetMapper(cfg, True)
    return [mapper(record) for record in records[:count]]


def losses_at(model: torch.nn.Module, batch: list[dict[str, Any]], iteration: int = 0) -> Any:
    """Run a training forward pass at an iteration."""
    with EventStorage(iteration) as storage:
        losses = model.train()(batch)
    return losses, storage


class Recorder(HookBase):
    """Keeps the losses and weights of every step as the event storage got them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def after_step(self) -> None:
        logged = self.trainer.storage.latest()
        now = {k: value for k, (value, at) in logged.items() if at == self.trainer.iter}
        self.steps.append({k: v for k, v in now.items() if "loss" in k or k.startswith("kd/")})


class Interrupt(HookBase):
    """Ends a run before a step, as a lost machine would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            raise KeyboardInterrupt


def train(cfg: CfgNode, *, resume: bool = False, until: int | None = None) -> Any:
    """Run a tiny training in this process; return the trainer and its `Recorder`."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    seed_all_rng(cfg.SEED)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    recorder = Recorder()
    trainer.register_hooks([recorder, *([] if until is None else [Interrupt(until)])])
    try:
        trainer.train()
    except KeyboardInterrupt:
        if until is None:
            raise
    return trainer, recorder


def torchrun(config: Path, *words: str) -> str:
    """Run train_net.py in two processes; return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(BASE.parents[1] / "train_net.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--config-file", str(config), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def calls_of(module: torch.nn.Module, action: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """(inputs, output) of each call of a module during an action."""
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, inputs, out: calls.append((inputs, out)))
    try:
        action()
    finally:
        handle.remove()
    return calls


def equal_states(a: Any, b: Any) -> bool:
    """Return whether two nested states hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_states(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
