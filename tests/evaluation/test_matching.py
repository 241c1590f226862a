"""Matches, the curves over them, reliability and scores of images."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_detections import random_results, random_truth

from kd_det.evaluation.image_scores import best_threshold, image_scores
from kd_det.evaluation.matching import Objects, match
from kd_det.evaluation.precision_curve import RECALLS, mean_curve
from kd_det.evaluation.reliability import reliability, scores_and_hits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_curves_are_those_of_pycocotools(seed: int, iou: float) -> None:
    """Crowds, classes without objects and images without detections among them."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=8, classes=5)
    results = random_results(rng, truth, quality=0.2, extra=8)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy({"info": {}, **truth})
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.iouThrs = np.array([iou])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 2]
    expected = precision[:, precision[0] > -1].mean(axis=1)
    matches = match(Objects.from_coco(truth), results, iou=iou)
    assert mean_curve(matches) == pytest.approx(expected, abs=1e-12)
    assert len(RECALLS) == 101


def test_a_hundred_detections_of_a_class_are_looked_at() -> None:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
    }
    many = [
        {"image_id": 1, "category_id": c, "bbox": [50, 50, 9, 9], "score": 0.9}
        for c in (1, 2)
        for _ in range(c * 60)
    ]
    last = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.1}
    matches = match(Objects.from_coco(truth), [*many, last])
    assert [(matches.label == k).sum() for k in (0, 1)] == [61, 100]
    assert matches.found.all()


def test_reliability_by_hand() -> None:
    score = np.array([0.05, 0.15, 0.19, 0.9, 1.0, 0.1])
    correct = np.array([False, False, True, True, True, False])
    found = reliability(score, correct)
    assert found.counts.tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found.confidence[1] == pytest.approx(0.44 / 3)
    assert found.precision[[0, 1, 9]] == pytest.approx([0, 1 / 3, 1])
    assert np.isnan(found.precision[2])
    # |0.05 - 0| * 1 + |0.44 / 3 - 1 / 3| * 3 + |0.95 - 1| * 2, over 6 detections.
    assert found.error == pytest.approx((0.05 + 0.56 + 0.1) / 6)
    assert np.isnan(reliability(np.zeros(0), np.zeros(0, bool)).error)


def test_images_are_scored_at_the_best_threshold() -> None:
    def box(image: int, x: float, score: float) -> dict[str, object]:
        return {"image_id": image, "category_id": 1, "bbox": [x, 0, 10, 10], "score": score}

    truth = {
        "images": [{"id": i} for i in range(4)],
        "categories": [{"id": 1}],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0}
            for i in (0, 1, 2)
        ],
    }
    results = [box(0, 0, 0.9), box(1, 2, 0.8), box(1, 50, 0.8), box(2, 80, 0.3)]
    matches = match(Objects.from_coco(truth), results)
    # F1 at 0.9: 2 / (3 + 1); at 0.8: 4 / (3 + 3); at 0.3: 4 / (3 + 4).
    assert best_threshold(matches) == 0.8
    # Moved by 2 of 10: IoU 8 / 12, one object and two boxes.
    assert image_scores(matches, 0.8) == pytest.approx(
        [1, 2 * (8 / 12) / 3, 0, np.nan], nan_ok=True
    )
    nothing = match(Objects.from_coco(truth), [box(0, 90, 0.9)])
    assert best_threshold(nothing) == 1.0
    assert image_scores(nothing, 1.0)[:3].tolist() == [0, 0, 0]
    score, hit = scores_and_hits(matches)
    assert (score.tolist(), hit.tolist()) == ([0.9, 0.8, 0.8, 0.3], [True, True, False, False])
