"""Whether a score means what it says: confidence against precision (Guo et al., ICML 2017)."""

from dataclasses import dataclass

import numpy as np

from kd_det.evaluation.matching import Bools, Floats, Ints, Matches


@dataclass(frozen=True)
class Reliability:
    """
    Detections in bins of equal width of score, from 0 to 1.

    Args:
        counts: (B,) detections.
        confidence: (B,) mean score; NaN where a bin is empty.
        precision: (B,) share of matches; NaN where a bin is empty.
        error: expected calibration error, 0 to 1: mean over detections of the distance between the
            confidence and the precision of their bin; NaN without detections.
    """

    counts: Ints
    confidence: Floats
    precision: Floats
    error: float


def reliability(score: Floats, correct: Bools, *, bins: int = 10) -> Reliability:
    """
    Compare scores with how often they are right.

    Args:
        score: (D,) 0 to 1.
        correct: (D,).
        bins: how many; a score on a border belongs to the bin above, 1 to the last.
    """
    place = np.clip((score * bins).astype(np.int64), 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, weights=score, minlength=bins) / counts
        precision = np.bincount(place, weights=correct, minlength=bins) / counts
    full = counts > 0
    gaps = np.abs(confidence - precision)[full]
    error = float((counts[full] * gaps).sum() / counts.sum()) if full.any() else float("nan")
    return Reliability(counts, confidence, precision, error)


def scores_and_hits(matches: Matches) -> tuple[Floats, Bools]:
    """Return the scores of the detections that count, and which of them are matches."""
    kept = matches.counted
    return matches.score[kept], (matches.target >= 0)[kept]
