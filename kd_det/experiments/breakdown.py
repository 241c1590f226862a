"""Where a difference lies: class by class, and by the size of objects."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kd_det.evaluation.bootstrap import SampledAP
from kd_det.evaluation.difference import compare_arms

SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def add_breakdown(
    arms: Sequence[dict[str, Any]],
    sampled: Mapping[str, SampledAP],
    baseline: str,
    names: Mapping[int, str],
) -> None:
    """
    Add `classes` and `sizes` to every arm but the baseline, the worst differences first.

    `classes`: name, AP of the baseline and of the arm, `mean`, `low` and `high` of the paired
    difference with its 95 % interval. `sizes`: the same with the least and the largest difference
    of a seed as `low` and `high`. What the test set has no object of is left out.

    Args:
        arms: of report.json, with their metrics.
        sampled: AP of the arms by name.
        baseline: name of the baseline.
        names: of classes by category id.
    """
    base = next(arm for arm in arms if arm["name"] == baseline)
    for arm in arms:
        if arm["name"] == baseline:
            continue
        of_classes = [
            _of_class(names[category], sampled[baseline].of_classes[category], own)
            for category, own in sampled[arm["name"]].of_classes.items()
        ]
        of_sizes = [_of_size(word, base[key], arm[key]) for key, word in SIZES.items()]
        for key, found in (("classes", of_classes), ("sizes", of_sizes)):
            arm[key] = sorted((one for one in found if one), key=lambda one: float(one["mean"]))


def _of_class(name: str, baseline: SampledAP, other: SampledAP) -> dict[str, Any] | None:
    if math.isnan(baseline.per_seed[0]):
        return None
    delta = compare_arms(baseline, other)
    return {
        "name": name,
        "baseline": float(baseline.per_seed.mean()),
        "AP": float(other.per_seed.mean()),
        **{key: getattr(delta, key) for key in ("mean", "low", "high")},
    }


def _of_size(name: str, baseline: Sequence[float], other: Sequence[float]) -> dict[str, Any] | None:
    if math.isnan(baseline[0]) or math.isnan(other[0]):
        return None
    deltas = [b - a for a, b in zip(baseline, other, strict=True)]
    return {
        "name": name,
        "baseline": fmean(baseline),
        "AP": fmean(other),
        "mean": fmean(deltas),
        "low": min(deltas),
        "high": max(deltas),
    }
