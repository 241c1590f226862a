"""Detectron2's COCO evaluator with a choice of the library that computes the metrics."""

import contextlib
import importlib.util
import io
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils.file_io import PathManager

from kd_det.evaluation.coco_index import index_pair
from kd_det.files import write_text

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "pycocotools", "faster_coco_eval")
# What a task reads of a prediction.
_FIELD = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def resolve_backend(backend: str) -> str:
    """
    Return the library to use: "pycocotools" or "faster_coco_eval".

    Args:
        backend: one of BACKENDS; "auto" is faster_coco_eval where it is installed.

    Raises:
        ValueError: any other name.
        ImportError: faster_coco_eval is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"TEST.COCO_BACKEND is {backend!r}; expected one of {list(BACKENDS)}")
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if backend == "faster_coco_eval" and not installed:
        raise ImportError(
            "TEST.COCO_BACKEND is 'faster_coco_eval', which is not installed; install "
            "kd_det[eval], or set it to 'pycocotools' (same numbers, slower)"
        )
    if backend == "auto":
        return "faster_coco_eval" if installed else "pycocotools"
    return backend


class COCODetectionEvaluator(COCOEvaluator):
    """
    Detectron2's `COCOEvaluator`; same metrics, same files, same keys, from 0 to 100.

    It differs in three points: the library is a choice, and is imported only here, so nothing else
    in the process is changed; no detection at all gives AP 0 where there are objects to find (an
    area range or a class without objects stays NaN); and an object with annotation id 0, which the
    COCO libraries can never count as found, is counted.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "auto",
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
    ) -> None:
        """
        Read the ground truth, making a built-in data set first if need be.

        Args:
            dataset_name: registered name.
            tasks: out of "bbox", "segm", "keypoints"; None infers them from the predictions.
            distributed: gather the predictions of all processes; the first one evaluates.
            output_dir: where predictions go, as coco_instances_results.json among others.
            backend: one of BACKENDS.
            max_dets_per_image: detections that count for AP, by score; None is COCO's 100.
                Keypoints always use 20.
            kpt_oks_sigmas: one per keypoint; empty is COCO's 17 of a person.

        Raises:
            ValueError: an image's id is no whole number; or the backend is unknown.
        """
        self._backend = resolve_backend(backend)
        _ensure_json(dataset_name)
        super().__init__(
            dataset_name,
            None if tasks is None else tuple(tasks),
            distributed,
            output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=False,
            kpt_oks_sigmas=tuple(kpt_oks_sigmas),
        )
        text = next((i for i in self._coco_api.imgs if not isinstance(i, int)), None)
        if text is not None:
            raise ValueError(
                f"Data set {dataset_name!r} ({self._metadata.json_file}) has the image id "
                f"{text!r}; COCO's evaluation wants whole numbers. Number its images, and their "
                "annotations' image_id alike."
            )

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """Save the predictions and fill self._results, one entry per task."""
        found = [result for entry in predictions for result in entry["instances"]]
        results = self._with_category_ids(found)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_text(path, json.dumps(results))
            logger.info("saved %d detections to %s", len(results), path)
        if not self._do_evaluation:
            logger.info("the data set has no annotations, so no metrics are computed")
            return
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            evaluation = self._evaluate_task(task, results, img_ids)
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )

    def _with_category_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return copies with the data set's own category ids for class indices 0..K-1."""
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            return results
        category_ids = {index: category_id for category_id, index in contiguous.items()}
        for result in results:
            if result["category_id"] not in category_ids:
                raise ValueError(
                    f"a prediction has class {result['category_id']}, but {self._metadata.name!r} "
                    f"has the classes 0 to {len(category_ids) - 1}; check the model's number of "
                    "classes"
                )
        return [
            {**result, "category_id": category_ids[result["category_id"]]} for result in results
        ]

    def _evaluate_task(
        self, task: str, results: list[dict[str, Any]], img_ids: Sequence[int] | None
    ) -> Any:
        """Return a COCOeval of the chosen library, accumulated and summarised."""
        field = _FIELD.get(task)
        if field is None:
            raise ValueError(f"unknown task {task!r}; expected some of {list(_FIELD)}")
        if any(field not in result for result in results):
            raise ValueError(f"task {task!r} needs {field!r} in every prediction of the model")
        coco_class, eval_class = _library(self._backend, self._max_dets_per_image)
        truth, found = index_pair(coco_class, self._coco_api.dataset, results, task)
        evaluation = eval_class(truth, found, task)
        # faster_coco_eval leaves out classes without objects, for keypoints alone.
        evaluation.params.catIds = sorted(truth.getCatIds())
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        if task == "keypoints":
            self._set_sigmas(evaluation, truth, results)
        else:
            evaluation.params.maxDets = list(self._max_dets_per_image)
        return self._run(evaluation, task)

    def _set_sigmas(self, evaluation: Any, truth: Any, results: list[dict[str, Any]]) -> None:
        if self._kpt_oks_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        counts = {"sigmas": len(evaluation.params.kpt_oks_sigmas)}
        for kind, entries in (("truth", truth.anns.values()), ("predictions", results)):
            first = next(iter(entries), None)
            if first is not None:
                counts[kind] = len(first.get("keypoints", ())) // 3
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"numbers of keypoints differ: {counts}; TEST.KEYPOINT_OKS_SIGMAS needs one value "
                "per keypoint of the data set (empty means the 17 of COCO's persons)"
            )

    def _run(self, evaluation: Any, task: str) -> Any:
        """Evaluate, with what the library prints on stdout going to the log instead."""
        evaluation.print_function = print
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()) as summary:
            evaluation.summarize()
        logger.info("%s metrics by %s:\n%s", task, self._backend, summary.getvalue().rstrip())
        return evaluation


def _library(backend: str, max_dets: Sequence[int]) -> tuple[Any, Any]:
    """Return the classes COCO and COCOeval of a library."""
    if backend == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO as PyCOCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools' own summary reads AP at 100 detections, whatever the limit is.
    return PyCOCO, COCOeval if max_dets[2] == 100 else COCOevalMaxDets


def _ensure_json(dataset_name: str) -> None:
    """Make a data set that is generated on first use, whose annotation file has a place already."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file and not PathManager.exists(json_file) and dataset_name in DatasetCatalog:
        DatasetCatalog.get(dataset_name)
