"""What a comparison found: the numbers (report.json) and the pages that show them (report.md)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from tabulate import tabulate

from kd_det.evaluation.bootstrap import CocoMatches, paired_bootstrap
from kd_det.experiments.environment import describe_environment, without_user_path
from kd_det.experiments.ground_truth import GroundTruth
from kd_det.experiments.plan import Plan, Run
from kd_det.experiments.recipe import Arm, Recipe

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_HEADERS = ("", *METRICS, "ΔAP [95 % interval]", "gap closed", "s/step", "memory")


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
    recipe: Recipe, plan: Plan, outcomes: Mapping[Run, Outcome], truth: GroundTruth, command: str
) -> dict[str, Any]:
    """
    Bring the results of all runs together.

    Args:
        recipe: what was run.
        plan: its runs.
        outcomes: what each of them gave.
        truth: the test set.
        command: the command line, for whoever wants to repeat it.

    Returns:
        The content of report.json. All AP are from 0 to 100. `delta` is the paired difference to
        the baseline over the same test images and seeds; `gap_closed` is its mean over the
        distance between the teacher and the baseline.
    """
    runs = {
        arm.name: [plan.students[arm.name, seed] for seed in recipe.seeds] for arm in recipe.arms
    }
    matches = {
        name: [CocoMatches.from_coco(truth.json_file, outcomes[r].detections) for r in of_arm]
        for name, of_arm in runs.items()
    }

    def delta(name: str, against: str) -> dict[str, float]:
        return paired_bootstrap(matches[against], matches[name])

    arms = [
        {
            **_setting(arm, recipe.seeds),
            **_numbers([outcomes[run] for run in runs[arm.name]]),
            "delta": None if arm.name == recipe.baseline else delta(arm.name, recipe.baseline),
        }
        for arm in recipe.arms
    ]
    teachers = [{"name": r.name, "seed": r.seed, **_numbers([outcomes[r]])} for r in plan.teachers]
    _relate(arms, teachers[0], recipe.baseline)
    return {
        "name": recipe.name,
        "command": command,
        "test_set": {"name": truth.name, "images": len(truth.coco["images"])},
        "baseline": recipe.baseline,
        "arms": arms,
        "comparisons": [
            {"arm": a, "against": b, "delta": delta(a, b)} for a, b in recipe.comparisons
        ],
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
    """Fill in what needs the baseline or the teacher: gap_closed and sec_per_step_ratio."""
    base = next(arm for arm in arms if arm["name"] == baseline)
    gap = teacher["mean"]["AP"] - base["mean"]["AP"]
    for arm in arms:
        # A teacher that is no better than the student leaves no gap to close.
        arm["gap_closed"] = arm["delta"]["mean"] / gap if arm["delta"] and gap > 0 else None
        known = arm["sec_per_step"] and base["sec_per_step"]
        arm["sec_per_step_ratio"] = arm["sec_per_step"] / base["sec_per_step"] if known else None


def table(report: Mapping[str, Any], style: str) -> str:
    """Return the report as a table in one of tabulate's styles."""
    others = [{**t, "label": f"teacher {t['name']}"} for t in report["other_teachers"]]
    teachers = [{**report["teacher"], "label": "teacher"}, *others]
    rows = [_row(entry) for entry in (*teachers, *report["arms"])]
    align = ("left", *("right" for _ in _HEADERS[1:]))
    return tabulate(rows, _HEADERS, tablefmt=style, colalign=align, disable_numparse=True)


def _row(entry: Mapping[str, Any]) -> list[str]:
    mean, std = entry["mean"], entry["std"]
    gap = entry.get("gap_closed")
    seconds, memory = entry["sec_per_step"], entry["peak_memory_mb"]
    ratio = entry.get("sec_per_step_ratio")
    return [
        entry["label"],
        *(_with_spread(mean[key], std[key] if key == "AP" else None) for key in METRICS),
        interval(entry["delta"]) if entry.get("delta") else "",
        "" if gap is None else f"{100 * gap:.0f} %",
        ("" if seconds is None else f"{seconds:.2f}") + (f" ({ratio:.2f}x)" if ratio else ""),
        "" if memory is None else f"{memory:.0f} MB",
    ]


def _with_spread(mean: float, std: float | None) -> str:
    if mean != mean:  # NaN: the test set has no object of that size
        return "-"
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def interval(delta: Mapping[str, float]) -> str:
    """Return a paired difference as text."""
    return f"{delta['mean']:+.1f} [{delta['low']:+.1f}, {delta['high']:+.1f}]"


def comparison_lines(report: Mapping[str, Any]) -> list[str]:
    """Return one line for each further comparison of the recipe."""
    labels = {arm["name"]: arm["label"] for arm in report["arms"]}
    return [
        f"{labels[item['arm']]} minus {labels[item['against']]}: {interval(item['delta'])} AP"
        for item in report["comparisons"]
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    environment = report["environment"]
    seeds = report["arms"][0]["seeds"]
    test_set = report["test_set"]
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    lines = [
        f"# {report['name']}",
        "",
        "![AP of every arm](report.png)",
        "",
        table(report, "github"),
        "",
        f"Box AP on `{test_set['name']}` ({test_set['images']} images), mean over {count}"
        + (" ± sample standard deviation" if len(seeds) > 1 else "")
        + f". ΔAP is the paired difference to `{report['baseline']}` with its 95 % interval "
        "(bootstrap over test images and seeds); gap closed is its share of the distance between "
        "the teacher and that arm. s/step is the median wall time of a training step (and its "
        "ratio to the baseline's), memory the peak of the training process.",
        "",
        *(f"* {line}" for line in comparison_lines(report)),
        *([""] if report["comparisons"] else []),
        f"`{report['command']}`",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None),
        "",
    ]
    return "\n".join(lines)


def read_detections(folder: Path) -> list[dict[str, Any]]:
    """Return the detections that a run left, in COCO's results format."""
    text = (folder / "inference" / "coco_instances_results.json").read_text(encoding="utf-8")
    detections: list[dict[str, Any]] = json.loads(text)
    return detections
