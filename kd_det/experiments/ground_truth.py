"""The test set of a comparison: annotations and images as files, whatever registered them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.data import register_from_config
from kd_det.experiments.recipe import RecipeError
from kd_det.text import nearest


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth in COCO format, and where its images are."""

    name: str
    json_file: Path
    # Its content.
    coco: dict[str, Any]
    image_root: Path

    @property
    def category_names(self) -> dict[int, str]:
        """Category id of the COCO json -> name."""
        return {item["id"]: item["name"] for item in self.coco["categories"]}


def check_test_set(cfg: CfgNode) -> None:
    """
    Register a config's data sets and see whether its test set can be compared on, before training.

    Raises:
        RecipeError: no such data set, or one that is not evaluated by COCO's AP.
        FileNotFoundError, ValueError: from `register_from_config`.
    """
    register_from_config(cfg.KD.DATASETS)
    (name,) = cfg.DATASETS.TEST
    if name not in DatasetCatalog:
        hint = nearest(name, DatasetCatalog.list())
        raise RecipeError(f"DATASETS.TEST names {name}, which is no registered data set; {hint}.")
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind != "coco":
        raise RecipeError(f"DATASETS.TEST: {name} is evaluated as {kind}; only coco is compared.")
    absent = [key for key in ("json_file", "image_root") if not MetadataCatalog.get(name).get(key)]
    if absent:
        raise RecipeError(
            f"DATASETS.TEST: {name} was registered without {' and '.join(absent)}, which a report "
            "reads; write it as a COCO file and list that under KD.DATASETS."
        )


def load_ground_truth(cfg: CfgNode) -> GroundTruth:
    """Read the test set of a config that passed `check_test_set`."""
    (name,) = cfg.DATASETS.TEST
    metadata = MetadataCatalog.get(name)
    file = Path(metadata.json_file)
    if not file.is_file():
        DatasetCatalog.get(name)  # makes a built-in set anew whose cache was deleted since
    return GroundTruth(
        name=name,
        json_file=file,
        coco=json.loads(file.read_text(encoding="utf-8")),
        image_root=Path(metadata.image_root),
    )


def check_ground_truth(truth: GroundTruth) -> None:
    """
    Refuse a test set on which models cannot be compared.

    Raises:
        RecipeError: it has no annotations, or one image alone.
    """
    if not truth.coco.get("annotations"):
        raise RecipeError(
            f"DATASETS.TEST: {truth.name} ({truth.json_file}) lists no annotations, so there is no "
            "AP to compare; annotate it, or take another test set."
        )
    count = len(truth.coco["images"])
    if count < 2:
        raise RecipeError(
            f"DATASETS.TEST: {truth.name} ({truth.json_file}) has {count} image; an interval over "
            "test images takes at least 2, and some hundreds to be narrow."
        )
