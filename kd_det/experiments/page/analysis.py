"""What the detections of each arm tell beyond AP; over all seeds, pictures of the first alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kd_det.evaluation.detection_errors import KINDS, Mistakes, find_mistakes
from kd_det.evaluation.image_scores import best_threshold, image_scores
from kd_det.evaluation.matching import Floats, Matches, Objects, match
from kd_det.evaluation.precision_curve import mean_curve
from kd_det.evaluation.reliability import Reliability, reliability, scores_and_hits

IOUS = (0.5, 0.75)


@dataclass(frozen=True)
class Insight:
    """
    One arm, or the teacher.

    Args:
        label: for readers.
        mistakes: of every seed.
        curves: IoU -> precision at 101 recalls, mean over classes and seeds.
        trust: scores against precision at IoU 0.5, all seeds' detections together.
        detections: how many of them, per seed.
        first: the first seed's matches at IoU 0.5.
        threshold: the score at which the first seed's F1 is highest.
        scores: (images,) of the first seed, see `image_scores`.
    """

    label: str
    mistakes: tuple[Mistakes, ...]
    curves: Mapping[float, Floats]
    trust: Reliability
    detections: float
    first: Matches
    threshold: float
    scores: Floats

    def count(self, kind: str) -> float:
        """Mistakes of a kind, mean over the seeds."""
        return fmean(one.counts[kind] for one in self.mistakes)

    def cost(self, kind: str) -> float:
        """AP at IoU 0.5 that a kind of mistakes costs, mean over the seeds."""
        return fmean(one.costs[kind] for one in self.mistakes)


def analyse(label: str, objects: Objects, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> Insight:
    """
    Look at the detections of an arm.

    Args:
        label: for readers.
        objects: of the test set.
        seeds: per seed its detections, COCO results; at least one seed.
    """
    matches = {iou: [match(objects, found, iou=iou) for found in seeds] for iou in IOUS}
    at_half = matches[0.5]
    pooled = [scores_and_hits(one) for one in at_half]
    threshold = best_threshold(at_half[0])
    return Insight(
        label=label,
        mistakes=tuple(find_mistakes(one) for one in at_half),
        curves={
            iou: np.mean([mean_curve(one) for one in of_iou], axis=0)
            for iou, of_iou in matches.items()
        },
        trust=reliability(
            np.concatenate([score for score, _ in pooled]),
            np.concatenate([hit for _, hit in pooled]),
        ),
        detections=fmean(len(found) for found in seeds),
        first=at_half[0],
        threshold=threshold,
        scores=image_scores(at_half[0], threshold),
    )


__all__ = ["IOUS", "KINDS", "Insight", "analyse"]
