"""
Give a committed report the present intervals, from what it holds alone.

    python benchmarks/reissue.py benchmarks/results/shapes ...

A report of an earlier version has every seed's AP, so the seeds' part of an interval is exact. Of
the test images it has only the percentile interval of a bootstrap that drew images and seeds. That
drawing spreads a mean over n seeds by the images' variance and by (n - 1) / n^2 of the seeds'
sample variance. What is left without the latter is the variance that all seeds share through the
images, plus a part (5/9 with three seeds) of what each seed makes of these images: a bound from
above, used here as if all of it were shared. In simulation the intervals are as wide as the exact
ones or, where that part is most of the images' noise, up to 15 % wider (medians). Exact ones come
from `kd-det compare` with the runs' detections at hand.

Rewrites report.json and report.md, and the chart in report.png; the photographs in it stay.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm

from kd_det.evaluation.difference import Difference, mean_difference
from kd_det.evaluation.power import power_summary
from kd_det.evaluation.verdict import judge
from kd_det.experiments import figure
from kd_det.experiments.report import markdown
from kd_det.files import write_json

RESAMPLES = 1000  # of the earlier bootstrap
METHOD = "seeds and test images, the latter bounded by an earlier bootstrap"


def reissued(per_seed: Sequence[float], low: float, high: float, images: int) -> Difference:
    """
    Recompute one difference.

    Args:
        per_seed: other minus baseline, AP points.
        low: lower bound of the earlier 95 % interval.
        high: its upper bound.
        images: of the test set.
    """
    values = np.asarray(per_seed, dtype=np.float64)
    seeds = len(values)
    drawn = ((high - low) / (2 * norm.ppf(0.975))) ** 2
    of_seeds = (seeds - 1) / seeds**2 * values.var(ddof=1) if seeds > 1 else 0.0
    shared = np.full((seeds, seeds), max(drawn - of_seeds, 0.0))
    return mean_difference(values, shared, images=images, resamples=RESAMPLES)


def reissue(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a report with the present intervals, verdicts and power."""
    per_seed = {arm["name"]: np.array(arm["AP"]) for arm in report["arms"]}
    arms = [dict(arm) for arm in report["arms"]]
    comparisons = [dict(item) for item in report["comparisons"]]
    targets = [
        *((arm, arm["name"], report["baseline"]) for arm in arms if arm["delta"]),
        *((item, item["arm"], item["against"]) for item in comparisons),
    ]
    if any("method" in entry["delta"] for entry, _, _ in targets):
        raise SystemExit(f"The report {report['name']} has the present intervals already.")
    differences = [
        reissued(
            per_seed[name] - per_seed[other],
            entry["delta"]["low"],
            entry["delta"]["high"],
            report["test_set"]["images"],
        )
        for entry, name, other in targets
    ]
    for (entry, _, _), delta in zip(targets, judge(differences), strict=True):
        if not math.isclose(delta["mean"], entry["delta"]["mean"], abs_tol=1e-6):
            raise SystemExit(
                f"{delta['mean']} is not the difference in the report {report['name']}"
            )
        method = METHOD if delta["seeds"] > 1 else delta["method"]
        entry["delta"] = {**delta, "method": method}
    power = power_summary(differences)
    return {**report, "arms": arms, "comparisons": comparisons, "power": power}


def redraw_chart(report: Mapping[str, Any], path: Path) -> None:
    """Replace the chart at the top of a report's figure, where `draw_report` puts it."""
    with Image.open(path) as old:
        page = old.convert("RGB")
    inches = 0.9 + 0.42 * len(report["arms"])
    canvas = Figure(figsize=(10, inches), dpi=150, facecolor="white")
    FigureCanvasAgg(canvas)
    area = (0.235, 0.55 / inches, 0.55, 1 - 0.85 / inches)
    figure._draw_chart(canvas.add_axes(area), report)
    canvas.savefig(path)
    with Image.open(path) as new:
        page.paste(new.convert("RGB"), (0, 0))
    page.save(path, optimize=True)


def main() -> None:
    """Reissue the reports of the folders given."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="each with a report.json")
    for folder in parser.parse_args().folders:
        text = (folder / "report.json").read_text(encoding="utf-8")
        report = reissue(json.loads(text))
        write_json(folder / "report.json", report)
        report = _nan_for_null(report)
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        redraw_chart(report, folder / "report.png")


def _nan_for_null(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report as it was before it was written: an AP without objects is NaN."""
    for entry in [*report["arms"], report["teacher"], *report["other_teachers"]]:
        entry["mean"] = {k: math.nan if v is None else v for k, v in entry["mean"].items()}
    return report


if __name__ == "__main__":
    main()
