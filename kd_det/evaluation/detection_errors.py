"""
Why detections are wrong, and what each kind of mistake costs: TIDE (Bolya et al., ECCV 2020).

Of a detection that is no match at IoU 0.5, let s and o be its highest IoU with objects of its own
and of other classes. Its kind is the first of these that holds, the order of the authors' toolkit:

    localisation     0.1 <= s < 0.5
    classification   o >= 0.5
    duplicate        s >= 0.5 (the object has a match of higher score)
    background       s, o <= 0.1
    both             what remains: 0.1 < o < 0.5

An object is missed if it has no match and no localisation or classification mistake points at it.

The cost of a kind is how much AP at IoU 0.5 rises when all its mistakes are put right and nothing
else changes: a localisation or classification mistake becomes a match of its object (the one of
highest score; the others, and those of objects that have a match, go), other detections go, and
missed objects are not asked for. (With several mistakes at one object the toolkit takes the highest
score over both kinds together; here each kind is put right as if the other were not there.)
"""

from dataclasses import dataclass

import numpy as np

from kd_det.evaluation.matching import Bools, Ints, Matches
from kd_det.evaluation.precision_curve import average_precision

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class Mistakes:
    """
    How often each of `KINDS` occurs, and its cost.

    Args:
        counts: of detections, of objects for "missed".
        costs: AP points (0 to 100) at IoU 0.5; at least 0.
        ap50: without any correction.
    """

    counts: dict[str, int]
    costs: dict[str, float]
    ap50: float


def kinds_of(matches: Matches) -> Ints:
    """
    Return the kind of every detection's mistake.

    Args:
        matches: at IoU 0.5.

    Returns:
        (D,) position in `KINDS`, -1 for matches and for what lies on a crowd region.
    """
    wrong = matches.counted & (matches.target < 0)
    same, other = matches.same, matches.other
    conditions = [
        ~wrong,
        (same >= BACKGROUND) & (same < FOREGROUND),
        other >= FOREGROUND,
        same >= FOREGROUND,
        np.maximum(same, other) <= BACKGROUND,
    ]
    names = ("localisation", "classification", "duplicate", "background")
    choices = [-1, *(KINDS.index(name) for name in names)]
    return np.select(conditions, choices, default=KINDS.index("both"))


def find_mistakes(matches: Matches) -> Mistakes:
    """
    Count the mistakes of one run by kind, and what each kind costs.

    Args:
        matches: at IoU 0.5.
    """
    kinds = kinds_of(matches)
    missed = _missed(matches, kinds)
    base = 100 * _ap(matches, matches.counted, matches.target >= 0, matches.label)
    costs = {}
    for place, kind in enumerate(KINDS):
        of_kind = kinds == place
        keep = matches.counted & ~of_kind
        positive, label = matches.target >= 0, matches.label
        left_out = missed if kind == "missed" else None
        if kind in ("classification", "localisation"):
            pointed = matches.other_object if kind == "classification" else matches.same_object
            right = _best_claims(matches, of_kind, pointed)
            keep, positive = keep | right, positive | right
            label = label.copy()
            label[right] = matches.test_set.label[pointed[right]]
        costs[kind] = max(0.0, 100 * _ap(matches, keep, positive, label, left_out) - base)
    counts = {kind: int((kinds == place).sum()) for place, kind in enumerate(KINDS)}
    counts["missed"] = int(missed.sum())
    return Mistakes(counts, costs, base)


def _missed(matches: Matches, kinds: Ints) -> Bools:
    missed = ~matches.found
    missed[matches.same_object[kinds == KINDS.index("localisation")]] = False
    missed[matches.other_object[kinds == KINDS.index("classification")]] = False
    return missed


def _best_claims(matches: Matches, of_kind: Bools, pointed: Ints) -> Bools:
    """Return which mistakes become matches: of each object without one, that of highest score."""
    rows = np.flatnonzero(of_kind)
    rows = rows[~matches.found[pointed[rows]]]
    rows = rows[np.argsort(-matches.score[rows], kind="stable")]
    _, first = np.unique(pointed[rows], return_index=True)
    best = np.zeros(len(of_kind), bool)
    best[rows[first]] = True
    return best


def _ap(
    matches: Matches,
    keep: Bools,
    positive: Bools,
    label: Ints,
    left_out: Bools | None = None,
) -> float:
    labels, count = matches.test_set.label, len(matches.test_set.category_ids)
    return average_precision(
        label[keep],
        matches.score[keep],
        positive[keep],
        np.bincount(labels, minlength=count).astype(float),
        left_out=None
        if left_out is None
        else np.bincount(labels[left_out], minlength=count).astype(float),
    )
