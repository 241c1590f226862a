"""AP, log-average miss rate and Jaccard index by the rules of CrowdHuman's toolkit.

Facts of the evaluation that the data set's authors released with CrowdDet (CVPR 2020), which
published numbers follow. Where they differ from `kd_det.evaluation.crowdhuman_metrics`:

    overlap  IoU above 0.5, a box excused if more than half of it is covered; 1e-6 square pixels are
             added to every denominator.
    order    one point of a curve for every detection that counts, by falling score; among equal
             scores in the order of the images, and within an image as detected.
    AP       the points joined by straight lines, from the first to the last: no envelope, nothing
             before the first detection. A perfect detector gets 1 - 1 / people.
    MR^-2    geometric mean of the miss rates at the first point with at least 0.01, 0.0178, 0.0316,
             0.0562, 0.1, 0.1778, 0.3162, 0.5623 and 1 false positives per image, or at the last
             point if there is none. 0 if any of them is 0.
    JI       detections of score above t. Of the matchings between people and detections that
             overlap, the one with the largest sum of IoU, which need not have the most pairs:
             k / (people + detections - k + 1e-6), mean over the images with any that count.

Without a detection the toolkit has no miss rate; here it is 1. If several matchings have exactly
the same sum of IoU, which one is taken is the matching library's choice, there as here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from kd_det.evaluation.crowdhuman_metrics import (
    OVERLAP,
    Array,
    CrowdScene,
    greedy_labels,
    overlaps,
)

FPPI_TABLE: Array = np.array([0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0])
# As the toolkit computes them: the third is a little more than 0.3.
SCORE_THRESHOLDS = tuple(0.1 * i for i in range(10))

_GUARD = 1e-6


def clip_to_frame(boxes: Array, width: float, height: float) -> Array:
    """Clips boxes (B, 4) as the toolkit does: the first corner to a pixel before the far border."""
    first = boxes[:, :2].clip(0, np.array([width - 1, height - 1]))
    return np.concatenate([first, boxes[:, 2:].clip(0, np.array([width, height]))], axis=1)


def _excused(boxes: Array, ignored: Array) -> NDArray[np.bool_]:
    """Whether an ignore region covers more than half of each box, (len(boxes),)."""
    covered: NDArray[np.bool_] = overlaps(boxes, ignored, guard=_GUARD)[1] > OVERLAP
    return np.any(covered, axis=1)


def match_official(scene: CrowdScene) -> NDArray[np.int8]:
    """Labels the detections of one image.

    Returns:
        (D,) in input order: 1 true positive, 0 false positive, -1 excused by an ignore region.
    """
    iou = overlaps(scene.detections, scene.people, guard=_GUARD)[0]
    excused = _excused(scene.detections, scene.ignored)
    return greedy_labels(iou, iou > OVERLAP, scene.scores, excused)


def _hits_in_order(scores: Array, labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Whether each detection that counts is a true positive, by falling score."""
    counted = labels >= 0
    order = np.argsort(-scores[counted], kind="stable")
    hits: NDArray[np.bool_] = labels[counted][order] == 1
    return hits


def average_precision(hits: NDArray[np.bool_], num_people: int) -> float:
    """Area under the precision-recall points joined by straight lines.

    Args:
        hits: true positive or false, by falling score, (D,).
        num_people: how many there are to find.

    Returns:
        AP in [0, 1); NaN without people.
    """
    if num_people == 0:
        return float("nan")
    found = hits.cumsum()
    recall, precision = found / num_people, found / np.arange(1, len(hits) + 1)
    return float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())


def log_average_miss_rate(hits: NDArray[np.bool_], num_people: int, num_images: int) -> float:
    """MR^-2 over `FPPI_TABLE`.

    Args:
        hits: true positive or false, by falling score, (D,).
        num_people: how many there are to find.
        num_images: how many images were searched.

    Returns:
        MR in [0, 1], lower is better; NaN without people.
    """
    if num_people == 0:
        return float("nan")
    if len(hits) == 0:
        return 1.0
    per_image = (~hits).cumsum() / num_images
    first = np.searchsorted(per_image, FPPI_TABLE, side="left").clip(max=len(hits) - 1)
    missed = 1.0 - hits.cumsum()[first] / num_people
    return float(np.exp(np.log(missed).mean())) if missed.all() else 0.0


def _jaccard(iou: Array, excused: NDArray[np.bool_], excused_people: NDArray[np.bool_]) -> float:
    """JI of one image; iou is (detections, people). NaN if nothing counts."""
    weight = np.where(iou > OVERLAP, iou, 0.0)
    rows, columns = linear_sum_assignment(weight, maximize=True)
    paired = weight[rows, columns] > 0
    rows, columns = rows[paired], columns[paired]
    num_pairs = len(rows)
    detections = len(excused) - np.delete(excused, rows).sum()
    people = len(excused_people) - np.delete(excused_people, columns).sum()
    if people == 0 and detections == 0:
        return float("nan")
    return float(num_pairs / (people + detections - num_pairs + _GUARD))


def jaccard_index(scenes: Sequence[CrowdScene]) -> float:
    """Best mean Jaccard index over `SCORE_THRESHOLDS`.

    Returns:
        JI in [0, 1]; NaN if no image has a person or a detection that counts.
    """
    per_image = np.empty((len(scenes), len(SCORE_THRESHOLDS)))
    for row, scene in zip(per_image, scenes, strict=True):
        iou = overlaps(scene.detections, scene.people, guard=_GUARD)[0]
        excused = _excused(scene.detections, scene.ignored)
        excused_people = _excused(scene.people, scene.ignored)
        for t, threshold in enumerate(SCORE_THRESHOLDS):
            kept = scene.scores > threshold
            row[t] = _jaccard(iou[kept], excused[kept], excused_people)
    counts = (~np.isnan(per_image)).sum(axis=0)
    if not counts.any():
        return float("nan")
    return float((np.nansum(per_image, axis=0) / np.maximum(counts, 1)).max())


def official_metrics(scenes: Sequence[CrowdScene]) -> dict[str, float]:
    """All metrics of a data set.

    Args:
        scenes: one per image in the order of the annotation file, also those without people or
            detections; boxes clipped by `clip_to_frame`.

    Returns:
        AP, MR, JI and recall (found people / people, with every detection kept) in percent; AP, MR
        and recall are NaN without people.

    Raises:
        ValueError: without images.
    """
    if not scenes:
        raise ValueError("found 0 images to evaluate; expected at least one")
    labels = np.concatenate([match_official(scene) for scene in scenes])
    hits = _hits_in_order(np.concatenate([scene.scores for scene in scenes]), labels)
    num_people = sum(len(scene.people) for scene in scenes)
    return {
        "AP": 100 * average_precision(hits, num_people),
        "MR": 100 * log_average_miss_rate(hits, num_people, len(scenes)),
        "JI": 100 * jaccard_index(scenes),
        "recall": 100 * float(hits.sum() / num_people) if num_people else float("nan"),
    }
