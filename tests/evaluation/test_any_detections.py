"""Every evaluator on odd truth and odd detections: numbers from 0 to 100, or nan for none."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_det.config import add_kd_config
from kd_det.evaluation.build import build_evaluator

NAME = "any_detections"
EVALUATORS = [
    ("coco", "COCO_BACKEND", "pycocotools"),
    ("coco", "COCO_BACKEND", "faster_coco_eval"),
    ("crowdhuman", "CROWDHUMAN_RULES", "official"),
    ("crowdhuman", "CROWDHUMAN_RULES", "smooth"),
]
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
thorough = settings(max_examples=400, deadline=None, derandomize=True, database=None)

side = st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 700]))
share = st.one_of(st.floats(-0.5, 1.5, width=32), st.sampled_from([0.0, 0.5, 1.0]))
box = st.tuples(share, share, share, share)
# Image sizes, annotated boxes with "ignore", detected boxes with scores.
scene = st.tuples(
    side,
    side,
    st.lists(st.tuples(box, st.booleans()), max_size=12),
    st.lists(st.tuples(box, st.sampled_from([0.0, 0.3, 0.3, 0.9, 1.0])), max_size=50),
)
scenes = st.lists(scene, min_size=1, max_size=4)


def corners(given_box: tuple[float, ...], width: int, height: int) -> list[float]:
    """In pixels, also of no width or height, and beyond the image."""
    x0, y0, x1, y1 = (s * n for s, n in zip(given_box, (width, height) * 2, strict=True))
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def register(folder: Path, kind: str, drawn: list[Any]) -> list[dict[str, Any]]:
    images, annotations, records = [], [], []
    for number, (width, height, truth, _) in enumerate(drawn):
        image = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        images.append(image)
        own = []
        for given_box, ignored in truth:
            x0, y0, x1, y1 = corners(given_box, width, height)
            own.append({"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(ignored)})
        records.append({**image, "image_id": number, "annotations": own})
        for entry in own:
            area = entry["bbox"][2] * entry["bbox"][3]
            more = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "area": area}
            annotations.append({**entry, **more})
            entry["bbox_mode"] = BoxMode.XYWH_ABS
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "truth.json").write_text(json.dumps(content))
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        evaluator_type=kind,
        thing_classes=["thing"],
        thing_dataset_id_to_contiguous_id={1: 0},
        **({"json_file": str(folder / "truth.json")} if kind == "coco" else {}),
    )
    return records


def detections(drawn: Any) -> dict[str, Instances]:
    width, height, _, found = drawn
    instances = Instances((height, width))
    boxes = [corners(given_box, width, height) for given_box, _ in found]
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score in found])
    instances.pred_classes = torch.zeros(len(found), dtype=torch.int64)
    return {"instances": instances}


def check(kind: str, key: str, value: str, drawn: list[Any]) -> None:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.TEST[key] = value
    with tempfile.TemporaryDirectory() as folder:
        records = register(Path(folder), kind, drawn)
        try:
            evaluator = build_evaluator(cfg, NAME, folder)
            evaluator.reset()
            for record, one in zip(records, drawn, strict=True):
                evaluator.process([record], [detections(one)])
            metrics = evaluator.evaluate()["bbox"]
        finally:
            DatasetCatalog.remove(NAME)
            MetadataCatalog.remove(NAME)
    assert {"AP"} <= set(metrics)
    assert all(math.isnan(number) or 0 <= number <= 100 for number in metrics.values()), metrics
    counted = [ignored for _, _, truth, _ in drawn for _, ignored in truth if not ignored]
    if kind == "coco":
        assert math.isnan(metrics["AP"]) == (not counted)


@pytest.mark.parametrize(("kind", "key", "value"), EVALUATORS)
def test_any_detections(kind: str, key: str, value: str) -> None:
    quick(given(scenes)(lambda drawn: check(kind, key, value, drawn)))()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "key", "value"), EVALUATORS)
def test_many_detections(kind: str, key: str, value: str) -> None:
    thorough(given(scenes)(lambda drawn: check(kind, key, value, drawn)))()
