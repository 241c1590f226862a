"""What a comparison found: the numbers of report.json."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from kd_det.evaluation.bootstrap import CocoMatches, sample_ap
from kd_det.evaluation.difference import compare_arms
from kd_det.evaluation.power import power_summary
from kd_det.evaluation.verdict import judge
from kd_det.experiments.breakdown import add_breakdown
from kd_det.experiments.environment import describe_environment, without_user_path
from kd_det.experiments.finished import detections_file
from kd_det.experiments.ground_truth import GroundTruth
from kd_det.experiments.plan import Plan, Run
from kd_det.experiments.pulls import summarize
from kd_det.experiments.recipe import Arm, Recipe

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Outcome:
    """A finished run: its result.json and its detections on the test set (COCO results)."""

    result: Mapping[str, Any]
    detections: Sequence[Mapping[str, Any]]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Detectron2's box metrics, AP from 0 to 100."""
        metrics: Mapping[str, Any] = self.result["metrics"]["bbox"]
        return metrics


def build_report(
    recipe: Recipe,
    plan: Plan,
    outcomes: Mapping[Run, Outcome],
    truth: GroundTruth,
    command: str,
    *,
    practical: float = 0.3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """
    Bring the results of all runs together.

    Args:
        recipe: what was run.
        plan: its runs.
        outcomes: what each of them gave.
        truth: the test set.
        command: the command line, for whoever wants to repeat it.
        practical: AP points; a difference below it does not matter.
        progress: called with the number of arms that are done, of which each takes seconds, and
            the number in all.

    Returns:
        The content of report.json. All AP are from 0 to 100. `delta` is the paired difference to
        the baseline over the same test images and seeds, as `kd_det.evaluation.verdict.judge`
        gives it; `gap_closed` is its mean over the distance between the teacher and the baseline;
        `pull` is how hard each distiller pulled, see `kd_det.experiments.pulls`;
        `classes` and `sizes` are where the difference lies, see `kd_det.experiments.breakdown`;
        `power` says how many seeds these comparisons need.
    """
    runs = {
        arm.name: [plan.students[arm.name, seed] for seed in recipe.seeds] for arm in recipe.arms
    }
    sampled = {}
    for name, of_arm in runs.items():
        matches = [CocoMatches.from_coco(truth.json_file, outcomes[r].detections) for r in of_arm]
        sampled[name] = sample_ap(matches)
        progress(len(sampled), len(runs))
    others = [arm.name for arm in recipe.arms if arm.name != recipe.baseline]
    # Those with the baseline are the arms' own, and count once.
    further = [pair for pair in recipe.comparisons if recipe.baseline not in pair]
    pairs = [*((name, recipe.baseline) for name in others), *further]
    differences = [compare_arms(sampled[b], sampled[a]) for a, b in pairs]
    judged = judge(differences, practical=practical)
    deltas = dict(zip(others, judged, strict=False))
    arms = [
        {
            **_setting(arm, recipe.seeds),
            **_numbers([outcomes[run] for run in runs[arm.name]]),
            "delta": deltas.get(arm.name),
            "pull": summarize([run.folder for run in runs[arm.name]]),
        }
        for arm in recipe.arms
    ]
    add_breakdown(arms, sampled, recipe.baseline, truth.category_names)
    teachers = [{"name": r.name, "seed": r.seed, **_numbers([outcomes[r]])} for r in plan.teachers]
    _relate(arms, teachers[0], recipe.baseline)
    return {
        "name": recipe.name,
        "command": command,
        "test_set": {"name": truth.name, "images": len(truth.coco["images"])},
        "baseline": recipe.baseline,
        "practical": practical,
        "arms": arms,
        "comparisons": [
            {"arm": a, "against": b, "delta": delta}
            for (a, b), delta in zip(further, judged[len(others) :], strict=True)
        ],
        "power": power_summary(differences),
        "teacher": teachers[0],
        "other_teachers": teachers[1:],
        "environment": describe_environment(),
    }


def _setting(arm: Arm, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what a report says of an arm beside its numbers."""
    return {
        "name": arm.name,
        "label": arm.label,
        "config": arm.config.name,
        "overrides": [without_user_path(word) for word in arm.overrides],
        "init_from": arm.init_from,
        "seeds": list(seeds),
    }


def _number(value: float | None) -> float:
    """Return a metric; the AP of a size range without objects is null in the file, NaN here."""
    return math.nan if value is None else float(value)


def _numbers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return metrics per seed, their means and spreads, and costs."""
    per_seed = {key: [_number(o.metrics[key]) for o in outcomes] for key in METRICS}
    several = len(outcomes) > 1
    return {
        **per_seed,
        "mean": {key: fmean(values) for key, values in per_seed.items()},
        # Sample standard deviation; nothing can be said from one seed.
        "std": {
            key: float(np.std(values, ddof=1)) if several else None
            for key, values in per_seed.items()
        },
        "sec_per_step": _middle(o.result["sec_per_step"] for o in outcomes),
        "peak_memory_mb": _middle(o.result["peak_memory_mb"] for o in outcomes),
        "iterations": outcomes[0].result["iterations"],
    }


def _middle(values: Any) -> float | None:
    """Return the median of the values that are there (an evaluated teacher has no step time)."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _relate(arms: list[dict[str, Any]], teacher: Mapping[str, Any], baseline: str) -> None:
    """Fill in what needs the teacher: gap_closed."""
    base = next(arm for arm in arms if arm["name"] == baseline)
    gap = teacher["mean"]["AP"] - base["mean"]["AP"]
    for arm in arms:
        # A teacher that is no better than the student leaves no gap to close.
        arm["gap_closed"] = arm["delta"]["mean"] / gap if arm["delta"] and gap > 0 else None


def read_detections(folder: Path) -> list[dict[str, Any]]:
    """Return the detections that a run left, in COCO's results format."""
    text = detections_file(folder).read_text(encoding="utf-8")
    detections: list[dict[str, Any]] = json.loads(text)
    return detections
