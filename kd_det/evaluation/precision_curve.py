"""Precision over recall as COCO reads it: monotone from the right, at 101 recalls, per class."""

import numpy as np

from kd_det.evaluation.matching import Bools, Floats, Ints, Matches

RECALLS: Floats = np.linspace(0.0, 1.0, 101)


def mean_curve(matches: Matches) -> Floats:
    """Return the mean over classes of precision at `RECALLS`, (101,); its mean is AP."""
    kept = matches.counted
    count = len(matches.test_set.category_ids)
    objects = np.bincount(matches.test_set.label, minlength=count).astype(float)
    found = _curves(matches.label[kept], matches.score[kept], (matches.target >= 0)[kept], objects)
    return found.mean(axis=0) if len(found) else np.zeros(len(RECALLS))


def average_precision(
    label: Ints, score: Floats, positive: Bools, objects: Floats, *, left_out: Floats | None = None
) -> float:
    """
    Return AP at one IoU, 0 to 1: the mean over the classes with objects.

    Args:
        label, score, positive: (D,) class, score, and whether it is a match, of detections.
        objects: (K,) of every class.
        left_out: (K,) how many of these are not asked for. A class of which none is left has AP 0,
            and does not count if it has no detections either.
    """
    curves = _curves(label, score, positive, objects, left_out)
    return float(curves.mean()) if len(curves) else float("nan")


def _curves(
    label: Ints, score: Floats, positive: Bools, objects: Floats, left_out: Floats | None = None
) -> Floats:
    """Return precision at `RECALLS` of every class that counts, (K', 101)."""
    order = np.argsort(-score, kind="stable")
    label, positive = label[order], positive[order]
    wanted = objects if left_out is None else objects - left_out
    detected = np.bincount(label, minlength=len(objects)) > 0
    counting = np.flatnonzero((objects > 0) & ((wanted > 0) | detected))
    curves = [_curve(positive[label == k], wanted[k]) for k in counting]
    return np.array(curves).reshape(-1, len(RECALLS))


def _curve(positive: Bools, objects: float) -> Floats:
    """Return precision at `RECALLS` of one class's detections, by falling score."""
    if not objects:
        return np.zeros(len(RECALLS))
    true = np.cumsum(positive)
    precision = true / np.arange(1, len(true) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(true / objects, RECALLS, side="left")]
