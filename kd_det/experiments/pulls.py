"""How hard each distiller of an arm pulled on its students, from what their runs logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kd_det.distillation.gradient_share import HIGH, LOW
from kd_det.experiments.training_curves import Curve, median_curve, read_records

# What is logged of each distiller, as kd/<distiller>/<quantity>.
QUANTITIES = {"share": "grad_share", "cosine": "cosine", "weight": "weight"}


def read_curves(folder: Path) -> dict[str, dict[str, Curve]]:
    """
    Read a run's metrics.json.

    Args:
        folder: of the run; a run without distillation, or without the file, has no curves.

    Returns:
        Per distiller (its name in loss keys) and quantity of `QUANTITIES`, the logged values.
    """
    curves: dict[str, dict[str, Curve]] = {}
    for record in read_records(folder):
        for key, value in record.items():
            prefix, _, rest = key.partition("/")
            name, _, logged = rest.rpartition("/")
            quantity = next((q for q, word in QUANTITIES.items() if word == logged), None)
            if prefix == "kd" and quantity:
                own = curves.setdefault(name, {}).setdefault(quantity, {})
                own[int(record["iteration"])] = float(value)
    return curves


def summarize(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """
    Bring the curves of an arm's seeds together.

    Returns:
        Per distiller and quantity: `first`, `middle` and `last` (medians over the seeds), and
        `curve`, [iteration, median over the seeds] pairs.
    """
    runs = [read_curves(folder) for folder in folders]
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        out[name] = {
            quantity: _summary(
                [run[name][quantity] for run in runs if quantity in run.get(name, {})]
            )
            for quantity in QUANTITIES
            if any(quantity in run.get(name, {}) for run in runs)
        }
    return out


def _summary(curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "first": median(c[min(c)] for c in curves),
        "middle": median(median(c.values()) for c in curves),
        "last": median(c[max(c)] for c in curves),
        "curve": [[i, value] for i, value in median_curve(curves).items()],
    }


def extremes(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every distiller that commands its student at first, or sleeps."""
    found = [
        (arm["label"], name, _strongest(pull))
        for arm in arms
        for name, pull in (arm.get("pull") or {}).items()
        if "share" in pull
    ]
    # A share of 3, SSIM's default from random weights, is measured as a little more or less.
    return [
        f"{label}: at first {name} pulls {share:.2g} times as hard as the detection losses, "
        + ("which is too hard for most" if share > HIGH else "which does next to nothing")
        + "; without a WEIGHT and a SHARE it sets itself (docs/troubleshooting.md)"
        for label, name, share in found
        if not LOW <= share <= 1.1 * HIGH
    ]


def _strongest(pull: Mapping[str, Any]) -> float:
    """Return the share at the start: of a weight that is warmed up, when it has risen."""
    weights = pull.get("weight", {}).get("curve", [])
    shares = pull["share"].get("curve", [])
    top = max((weight for _, weight in weights), default=0.0)
    risen = next((iteration for iteration, weight in weights if weight >= 0.99 * top), 0)
    after = (share for iteration, share in shares if iteration >= risen)
    return float(next(after, pull["share"]["first"]))


def rows(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a line per arm and distiller: label, distiller, share, cosine, weight."""
    return [
        [arm["label"], name, *(_course(found.get(quantity)) for quantity in QUANTITIES)]
        for arm in arms
        for name, found in (arm.get("pull") or {}).items()
    ]


def _course(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "-"
    return " → ".join(f"{summary[part]:.2g}" for part in ("first", "middle", "last"))
