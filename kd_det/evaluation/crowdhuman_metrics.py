"""Smooth AP, log-average miss rate and Jaccard index of people in crowds, on numpy and scipy.

The metrics of CrowdHuman (Shao et al., 2018, arXiv:1805.00123), defined here as follows. A person
and a detection overlap if their IoU is at least 0.5. An ignore region excuses a box if it covers at
least half of the area of that box.

Caltech matching (Dollar et al., PAMI 2012) for AP, MR and recall: per image, in descending score
order (equal scores in input order), a detection takes the still free person of highest IoU among
those it overlaps: a true positive. If there is none and an ignore region excuses it, it counts as
nothing; a region may excuse many. Otherwise it is a false positive.

    recall  found people / people, with every detection kept.
    AP      area under the precision-recall curve, each precision replaced by the highest at this or
            any greater recall.
    MR^-2   geometric mean of the lowest miss rates (1 - recall) attainable with no more than
            10^-2, 10^-1.75, ..., 10^0 false positives per image, over all images.
    JI      per image k / (people + detections - k), with k the size of a maximum bipartite matching
            between people and detections of score >= t. Unmatched people and unmatched detections
            that an ignore region excuses do not count; of several maximum matchings the one that
            leaves the most excused boxes unmatched is taken, so the value is unique. Mean over the
            images where anything counts, then maximum over t = 0, 0.1, ..., 0.9.

A point of a curve is a score threshold: equal scores enter together, so the order of the images
cannot matter. CrowdHuman's own toolkit has other rules: `kd_det.evaluation.crowdhuman_official`,
which is what its published numbers follow and what the evaluator uses unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float64]

OVERLAP = 0.5
FPPI_POINTS: Array = np.logspace(-2.0, 0.0, 9)
JI_SCORE_THRESHOLDS: Array = np.arange(10) / 10

# Floor of a miss rate under the logarithm, as in the Caltech toolbox.
_LEAST_MISS_RATE = 1e-10


@dataclass(frozen=True)
class CrowdScene:
    """One image: who is there, where nobody is asked about, and what was detected.

    Args:
        people: boxes to find, (M, 4) as x0, y0, x1, y1.
        ignored: ignore regions, (I, 4).
        detections: detected boxes, (D, 4).
        scores: their scores, (D,); any finite range, JI assumes [0, 1].

    Raises:
        ValueError: on a wrong shape or a value that is not finite.
    """

    people: Array
    ignored: Array
    detections: Array
    scores: Array

    def __post_init__(self) -> None:
        for name in ("people", "ignored", "detections"):
            shape = getattr(self, name).shape
            if len(shape) != 2 or shape[1] != 4:
                raise ValueError(f"{name} has shape {shape}; expected (number of boxes, 4)")
        if self.scores.shape != (len(self.detections),):
            raise ValueError(
                f"scores have shape {self.scores.shape}; expected one for each of the "
                f"{len(self.detections)} detections"
            )
        for name in ("people", "ignored", "detections", "scores"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} hold NaN or infinite values; expected finite numbers")


def overlaps(a: Array, b: Array, *, guard: float = 0.0) -> tuple[Array, Array]:
    """IoU, and intersection over the area of the box in a; each (len(a), len(b)).

    Args:
        a: boxes, (A, 4).
        b: boxes, (B, 4).
        guard: square pixels added to the denominators.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    area_a = np.clip(a[:, 2:] - a[:, :2], 0, None).prod(axis=1)[:, None]
    area_b = np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1)[None, :]
    union = area_a + area_b - intersection
    # A box without area intersects nothing: 0 divided by the smallest positive number is 0.
    tiny = np.finfo(np.float64).tiny
    return (
        intersection / np.maximum(union + guard, tiny),
        intersection / np.maximum(area_a + guard, tiny),
    )


def _excused(boxes: Array, ignored: Array) -> NDArray[np.bool_]:
    """Whether an ignore region covers at least half of each box, (len(boxes),)."""
    covered: NDArray[np.bool_] = overlaps(boxes, ignored)[1] >= OVERLAP
    return np.any(covered, axis=1)


def greedy_labels(
    iou: Array, overlapping: NDArray[np.bool_], scores: Array, excused: NDArray[np.bool_]
) -> NDArray[np.int8]:
    """Matches detections to people, one after the other in descending score order.

    Args:
        iou: (D, M).
        overlapping: whether a detection may take a person, (D, M).
        scores: (D,); equal ones keep their order.
        excused: whether a detection that takes nobody counts as nothing, (D,).

    Returns:
        (D,) in input order: 1 true positive, 0 false positive, -1 excused.
    """
    labels = np.where(excused, -1, 0).astype(np.int8)
    free = np.where(overlapping, iou, -1.0)
    candidates = np.flatnonzero(overlapping.any(axis=1))
    for i in candidates[np.argsort(-scores[candidates], kind="stable")]:
        best = free[i].argmax()
        if free[i, best] >= 0:
            labels[i] = 1
            free[:, best] = -1.0  # taken
    return labels


def match_caltech(scene: CrowdScene) -> NDArray[np.int8]:
    """Labels the detections of one image by greedy Caltech matching.

    Returns:
        (D,) in input order: 1 true positive, 0 false positive, -1 excused by an ignore region.
    """
    iou = overlaps(scene.detections, scene.people)[0]
    excused = _excused(scene.detections, scene.ignored)
    return greedy_labels(iou, iou >= OVERLAP, scene.scores, excused)


def _operating_points(scores: Array, labels: NDArray[np.int8]) -> tuple[Array, Array]:
    """True and false positives at each distinct score used as threshold, highest first."""
    counted = labels >= 0
    scores, hits = scores[counted], labels[counted] == 1
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], hits[order]
    last_of_equals = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
    return (
        hits.cumsum()[last_of_equals].astype(np.float64),
        (~hits).cumsum()[last_of_equals].astype(np.float64),
    )


def average_precision(scores: Array, labels: NDArray[np.int8], num_people: int) -> float:
    """Area under the precision-recall curve with the precision envelope.

    Args:
        scores: of all detections of all images, (D,).
        labels: as from `match_caltech`, (D,).
        num_people: how many there are to find.

    Returns:
        AP in [0, 1]; NaN without people.
    """
    if num_people == 0:
        return float("nan")
    hits, misfires = _operating_points(scores, labels)
    precision = hits / (hits + misfires)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits / num_people, prepend=0.0) * envelope).sum())


def log_average_miss_rate(
    scores: Array, labels: NDArray[np.int8], num_people: int, num_images: int
) -> float:
    """MR^-2, the log-average miss rate over `FPPI_POINTS`.

    Args:
        scores: of all detections of all images, (D,).
        labels: as from `match_caltech`, (D,).
        num_people: how many there are to find.
        num_images: how many images were searched.

    Returns:
        MR in [0, 1], lower is better; 0 if nobody is missed at any point, NaN without people.
    """
    if num_people == 0:
        return float("nan")
    hits, misfires = _operating_points(scores, labels)
    # The threshold above all scores finds nobody and is always attainable.
    miss_rate = (num_people - np.append(0.0, hits)) / num_people
    attainable = np.append(0.0, misfires) / num_images
    at_points = miss_rate[np.searchsorted(attainable, FPPI_POINTS, side="right") - 1]
    if not at_points.any():
        return 0.0
    return float(np.exp(np.log(np.maximum(at_points, _LEAST_MISS_RATE)).mean()))


def _jaccard(
    overlapping: NDArray[np.bool_], excused: NDArray[np.bool_], excused_people: NDArray[np.bool_]
) -> float:
    """JI of one image; overlapping is (detections, people). NaN if nothing counts."""
    # k + 1 pairs outweigh any k pairs; then, a box that counts either way had better be paired.
    pair_weight = 2 * min(overlapping.shape) + 1 + ~excused[:, None] + ~excused_people[None, :]
    rows, columns = linear_sum_assignment(overlapping * pair_weight, maximize=True)
    paired = overlapping[rows, columns]
    rows, columns = rows[paired], columns[paired]
    num_pairs = len(rows)
    detections = num_pairs + (~np.delete(excused, rows)).sum()
    people = num_pairs + (~np.delete(excused_people, columns)).sum()
    union = people + detections - num_pairs
    return float(num_pairs / union) if union else float("nan")


def jaccard_index(scenes: Sequence[CrowdScene]) -> tuple[float, float]:
    """Best mean Jaccard index over `JI_SCORE_THRESHOLDS`.

    Returns:
        JI in [0, 1] and the lowest score threshold that reaches it; both NaN if no image has a
        person or a detection that counts.
    """
    per_image = np.empty((len(scenes), len(JI_SCORE_THRESHOLDS)))
    for row, scene in zip(per_image, scenes, strict=True):
        overlapping = overlaps(scene.detections, scene.people)[0] >= OVERLAP
        excused = _excused(scene.detections, scene.ignored)
        excused_people = _excused(scene.people, scene.ignored)
        for t, threshold in enumerate(JI_SCORE_THRESHOLDS):
            # A score of 0.7 in float32 is a little less than in float64.
            kept = scene.scores >= threshold - 1e-6
            row[t] = _jaccard(overlapping[kept], excused[kept], excused_people)
    counts = (~np.isnan(per_image)).sum(axis=0)
    if not counts.any():
        return float("nan"), float("nan")
    means = np.nansum(per_image, axis=0) / np.maximum(counts, 1)
    best = int(means.argmax())
    return float(means[best]), float(JI_SCORE_THRESHOLDS[best])


def crowd_metrics(scenes: Sequence[CrowdScene]) -> dict[str, float]:
    """All metrics of a data set.

    Args:
        scenes: one per image, also the images without people or detections.

    Returns:
        AP, MR, JI and recall in percent; AP, MR and recall are NaN without people.

    Raises:
        ValueError: without images.
    """
    if not scenes:
        raise ValueError("found 0 images to evaluate; expected at least one")
    labels = np.concatenate([match_caltech(scene) for scene in scenes])
    scores = np.concatenate([scene.scores for scene in scenes])
    num_people = sum(len(scene.people) for scene in scenes)
    recall = (labels == 1).sum() / num_people if num_people else float("nan")
    return {
        "AP": 100 * average_precision(scores, labels, num_people),
        "MR": 100 * log_average_miss_rate(scores, labels, num_people, len(scenes)),
        "JI": 100 * jaccard_index(scenes)[0],
        "recall": 100 * float(recall),
    }
