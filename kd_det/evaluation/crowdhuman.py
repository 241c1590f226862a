"""Detectron2 evaluator for CrowdHuman and own data in its format: AP, MR^-2, JI and recall."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from kd_det.evaluation.crowdhuman_metrics import Array, CrowdScene, crowd_metrics
from kd_det.evaluation.crowdhuman_official import clip_to_frame, official_metrics
from kd_det.files import write_text

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "crowdhuman_predictions.json"
RULES = ("official", "smooth")


class CrowdHumanEvaluator(DatasetEvaluator):
    """Measures detections of one class, people, against boxes and ignore regions.

    As in CrowdHuman's toolkit, annotated boxes and detections are clipped to the image first:
    bodies are annotated beyond its border, Detectron2's detections end there. All images of the
    data set count.

    Args:
        dataset_name: a registered data set; annotations with iscrowd=1 are ignore regions.
        output_dir: where `crowdhuman_predictions.json` goes, a list of {image_id, category_id, bbox
            in pixels x y w h, score} as in COCO's result format; None writes nothing.
        distributed: collect the detections of all processes; otherwise this one stands for itself.
        rules: "official", those of CrowdHuman's toolkit and of published numbers
            (`kd_det.evaluation.crowdhuman_official`), or "smooth"
            (`kd_det.evaluation.crowdhuman_metrics`), which depend neither on the order of images
            nor on single detections.

    Raises:
        ValueError: if the rules are neither.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        distributed: bool = True,
        rules: str = "official",
    ) -> None:
        if rules not in RULES:
            raise ValueError(f"TEST.CROWDHUMAN_RULES is {rules!r}; expected one of {list(RULES)}")
        self._rules = rules
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        # Read now: a data set that is absent or broken is told before the inference, not after.
        self._dataset = {
            str(image["image_id"]): image for image in DatasetCatalog.get(dataset_name)
        }
        self._predictions: dict[str, tuple[Array, Array]] = {}

    def reset(self) -> None:
        """Forgets all detections."""
        self._predictions = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Takes the detections of a batch.

        Args:
            inputs: Detectron2's batch, of which image_id is read.
            outputs: per image {"instances": Instances} in the frame of the original image, with
                pred_boxes, scores and pred_classes.

        Raises:
            KeyError: if the data set has no such image.
            ValueError: if a detection is of another class than 0.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = str(image["image_id"])
            if image_id not in self._dataset:
                raise KeyError(
                    f"image_id {image_id!r} is not in {self._dataset_name}; expected the images of "
                    "the data set this evaluator was made for"
                )
            instances = output["instances"].to("cpu")
            if (instances.pred_classes != 0).any():
                raise ValueError(
                    f"found class {int(instances.pred_classes.max())} in the detections of image "
                    f"{image_id!r}; expected class 0 (person) alone: train with one class "
                    "(NUM_CLASSES 1)"
                )
            boxes = instances.pred_boxes.tensor.detach().numpy().astype(np.float64)
            scores = instances.scores.detach().numpy().astype(np.float64)
            self._predictions[image_id] = (boxes, scores)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Computes, prints and returns the metrics.

        Returns:
            {"bbox": {"AP", "MR", "JI", "recall"}} in percent, on the main process; {} on others.
        """
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(self._predictions, dst=0)
            if not comm.is_main_process():
                return {}
            self._predictions = {k: v for part in gathered for k, v in part.items()}
        num_missing = len(self._dataset) - len(self._predictions)
        if num_missing:
            logger.warning(
                "%d of the %d images of %s were not processed; they count as without detections",
                num_missing,
                len(self._dataset),
                self._dataset_name,
            )
        if self._output_dir is not None:
            self._save(Path(self._output_dir))
        measure = official_metrics if self._rules == "official" else crowd_metrics
        metrics = measure([self._scene(image_id) for image_id in self._dataset])
        logger.info(
            "CrowdHuman metrics of %s by the %s rules:\n%s",
            self._dataset_name,
            self._rules,
            create_small_table(metrics),
        )
        return {"bbox": metrics}

    def _scene(self, image_id: str) -> CrowdScene:
        image = self._dataset[image_id]
        annotated = np.array(
            [
                BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
                for annotation in image["annotations"]
            ],
            dtype=np.float64,
        ).reshape(-1, 4)
        ignored = np.array(
            [annotation.get("iscrowd", 0) for annotation in image["annotations"]], dtype=bool
        )
        nothing = np.zeros((0, 4)), np.zeros(0)
        detections, scores = self._predictions.get(image_id, nothing)
        width, height = image["width"], image["height"]
        if self._rules == "official":
            annotated, detections = (
                clip_to_frame(boxes, width, height) for boxes in (annotated, detections)
            )
        else:
            frame = np.array([width, height] * 2, dtype=np.float64)
            annotated, detections = annotated.clip(0, frame), detections.clip(0, frame)
        return CrowdScene(annotated[~ignored], annotated[ignored], detections, scores)

    def _save(self, folder: Path) -> None:
        results = [
            {
                "image_id": image_id,
                "category_id": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for image_id, (boxes, scores) in self._predictions.items()
            for (x0, y0, x1, y1), score in zip(boxes.tolist(), scores.tolist(), strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PREDICTIONS_FILE, json.dumps(results))
