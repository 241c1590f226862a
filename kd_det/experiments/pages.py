"""The numbers of a comparison as people read them: tables, sentences, report.md."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from kd_det.experiments.pulls import extremes
from kd_det.experiments.pulls import rows as pull_rows
from kd_det.experiments.report import METRICS

HEADERS = ("", *METRICS, "ΔAP [95 % interval]", "gap closed", "memory")
SHARES = ("", "distiller", "gradient share", "cosine", "weight")


def table(report: Mapping[str, Any], style: str) -> str:
    """Return the report as a table in one of tabulate's styles."""
    others = [{**t, "label": f"teacher {t['name']}"} for t in report["other_teachers"]]
    teachers = [{**report["teacher"], "label": "teacher"}, *others]
    lines = [row(entry) for entry in (*teachers, *report["arms"])]
    align = ("left", *("right" for _ in HEADERS[1:]))
    return tabulate(lines, HEADERS, tablefmt=style, colalign=align, disable_numparse=True)


def row(entry: Mapping[str, Any]) -> list[str]:
    """Return the cells of an arm or a teacher with a label, in the order of `HEADERS`."""
    mean, std = entry["mean"], entry["std"]
    gap = entry.get("gap_closed")
    memory = entry["peak_memory_mb"]
    return [
        entry["label"],
        *(_with_spread(mean[key], std[key] if key == "AP" else None) for key in METRICS),
        interval(entry["delta"]) if entry.get("delta") else "",
        "" if gap is None else f"{100 * gap:.0f} %",
        "" if memory is None else f"{memory:.0f} MB",
    ]


def _with_spread(mean: float, std: float | None) -> str:
    if mean != mean:  # NaN: the test set has no object of that size
        return "-"
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def interval(delta: Mapping[str, Any]) -> str:
    """Return a paired difference as text."""
    return f"{delta['mean']:+.2f} [{delta['low']:+.2f}, {delta['high']:+.2f}]"


def comparison_lines(report: Mapping[str, Any]) -> list[str]:
    """
    Return a line for each difference with what it shows, one about the seeds needed, and one for
    each distiller whose pull was extreme.
    """
    labels = {arm["name"]: arm["label"] for arm in report["arms"]}
    to_baseline = [
        {"arm": arm["name"], "against": report["baseline"], "delta": arm["delta"]}
        for arm in report["arms"]
        if arm["delta"]
    ]
    items = [*to_baseline, *report["comparisons"]]
    return [
        *(
            f"{labels[item['arm']]} minus {labels[item['against']]}: "
            f"{interval(item['delta'])} AP, {finding(item['delta'], len(items))}"
            for item in items
        ),
        *_power_lines(report["power"]),
        *extremes(report["arms"]),
    ]


def finding(delta: Mapping[str, Any], comparisons: int) -> str:
    """Return the verdict, and whether it holds among all comparisons of the report."""
    verdict: str = delta["verdict"]
    if comparisons == 1 or verdict not in ("gain", "loss"):
        return verdict
    holds = "holds" if delta["holm"] < 0.05 else "does not hold"
    return f"{verdict} ({holds} after Holm's correction for {comparisons} comparisons)"


def _power_lines(power: Mapping[str, Any] | None) -> list[str]:
    if power is None:
        return []
    spread = f"{power['seed_sd']:.2f} AP between seeds, {power['image_sd']:.2f} from test images"
    needed = (
        "no number of seeds on so few test images"
        if power["seeds"] is None
        else f"{power['seeds']} seeds"
    )
    return [
        f"To see a difference of {power['effect']} AP (80 % power, two-sided 5 %) takes {needed}: "
        f"differences spread by {spread}"
    ]


def _about_intervals(seeds: int) -> str:
    """Return what the table's intervals mean."""
    if seeds == 1:
        return (
            "95 % interval, over test images only: another seed might say the opposite, so it "
            "allows no verdict"
        )
    return "95 % interval (t, over seeds and test images: docs/intervals.md)"


def pull_table(report: Mapping[str, Any], style: str) -> str:
    """Return how hard each arm's distillers pulled; empty where nothing was logged."""
    found = pull_rows(report["arms"])
    return tabulate(found, SHARES, tablefmt=style, disable_numparse=True) if found else ""


def _pull_lines(report: Mapping[str, Any]) -> list[str]:
    pulls = pull_table(report, "github")
    if not pulls:
        return []
    return [
        pulls,
        "",
        "Gradient share: norm of a distiller's gradient at the student's captured features over "
        "that of the detection losses; cosine: of the angle between both. First, median and last "
        "measurement, median over the seeds.",
        "",
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    environment = report["environment"]
    seeds = report["arms"][0]["seeds"]
    test_set = report["test_set"]
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    findings = comparison_lines(report)
    lines = [
        f"# {report['name']}",
        "",
        "![AP of every arm](report.png)",
        "",
        table(report, "github"),
        "",
        f"Box AP on `{test_set['name']}` ({test_set['images']} images), mean over {count}"
        + (" ± sample standard deviation" if len(seeds) > 1 else "")
        + f". ΔAP is the paired difference to `{report['baseline']}` with its "
        f"{_about_intervals(len(seeds))}; gap closed is its share of the distance between "
        "the teacher and that arm; memory the peak of the training process. Speeds are for `kd-det "
        "bench`: these runs shared the machine with each other.",
        "",
        *(f"* {line}" for line in findings),
        *([""] if findings else []),
        *_pull_lines(report),
        f"`{report['command']}`",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None),
        "",
    ]
    return "\n".join(lines)
