"""Ground truth and detections as objects of a COCO library, without its quirks."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def index_pair(
    coco_class: Any, dataset: Mapping[str, Any], results: Iterable[Mapping[str, Any]], task: str
) -> tuple[Any, Any]:
    """
    Index a data set and the detections on it. Neither argument is changed, which the libraries do.

    Args:
        coco_class: class `COCO` of pycocotools or of a library with its interface.
        dataset: content of an annotation file in COCO format.
        results: detections in COCO's result format; none of them is fine.
        task: "bbox", "segm" or "keypoints".

    Returns:
        Ground truth and detections. Annotation ids count from 1: the libraries write the id of its
        object beside a detection and take 0 for "not matched".
    """
    annotations = [{**a, "id": i} for i, a in enumerate(dataset["annotations"], start=1)]
    # With a box present, the libraries take its area for the mask's.
    dropped = {"bbox"} if task == "segm" else set()
    entries = [{k: v for k, v in result.items() if k not in dropped} for result in results]
    truth = _index(coco_class(), dataset, annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        # pycocotools cannot load an empty list.
        found = truth.loadRes(entries) if entries else _index(coco_class(), dataset, [])
    return truth, found


def _index(coco: Any, dataset: Mapping[str, Any], annotations: Sequence[Any]) -> Any:
    # Some versions of pycocotools insist on "info".
    coco.dataset = {
        "info": {},
        "images": dataset["images"],
        "categories": dataset["categories"],
        "annotations": list(annotations),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
