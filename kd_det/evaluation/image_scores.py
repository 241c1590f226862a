"""How well single images come out, at the score above which a model's boxes are worth showing."""

import numpy as np

from kd_det.evaluation.matching import Floats, Matches


def best_threshold(matches: Matches) -> float:
    """
    Return the score above which (or at which) F1 over the whole test set is highest.

    F1 = 2 matches / (objects + detections). 1 where no detection is a match.
    """
    kept = matches.counted
    order = np.argsort(-matches.score[kept], kind="stable")
    score = matches.score[kept][order]
    true = np.cumsum((matches.target >= 0)[kept][order])
    f1 = 2 * true / (len(matches.test_set.image) + np.arange(1, len(true) + 1))
    if not len(true) or not true[-1]:
        return 1.0
    # Equal scores come together.
    last = np.append(score[1:] != score[:-1], True)
    return float(score[np.flatnonzero(last)[f1[last].argmax()]])


def image_scores(matches: Matches, threshold: float) -> Floats:
    """
    Score every image: F1 in which a match counts its IoU.

    2 * sum of the matches' IoU / (objects + detections at the threshold or above), 0 to 1; NaN
    where an image has neither objects nor such detections.
    """
    count = len(matches.test_set.image_ids)
    shown = matches.counted & (matches.score >= threshold)
    hits = shown & (matches.target >= 0)
    overlap = np.bincount(
        matches.image[hits], weights=matched_overlap(matches)[hits], minlength=count
    )
    total = np.bincount(matches.image[shown], minlength=count) + np.bincount(
        matches.test_set.image, minlength=count
    )
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, 2 * overlap / np.maximum(total, 1), np.nan)


def matched_overlap(matches: Matches) -> Floats:
    """Return the IoU of every detection with the object it is a match of, (D,); 0 without one."""
    boxes, target = matches.boxes, matches.target
    if not len(matches.test_set.boxes):
        return np.zeros(len(boxes))
    other = matches.test_set.boxes[target]
    low = np.maximum(boxes[:, :2], other[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], other[:, :2] + other[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + other[:, 2:].prod(axis=1) - common
    return np.where(target >= 0, common / np.maximum(union, 1e-9), 0.0)
