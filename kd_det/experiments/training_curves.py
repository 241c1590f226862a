"""The course of losses over a run, from what it logged."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Per iteration, the value.
Curve = dict[int, float]

_DISTILLATION = "loss_kd_"


def read_records(folder: Path) -> Iterator[Mapping[str, Any]]:
    """
    Yield what a run wrote into metrics.json, line by line; nothing where there is no such file.

    Lines without an iteration, and half a line that a killed run left, are passed over.
    """
    path = folder / "metrics.json"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            yield record


def loss_curves(folders: Sequence[Path]) -> dict[str, Curve]:
    """
    Bring the losses of an arm's seeds together.

    Args:
        folders: of its runs.

    Returns:
        "detection" and "distillation": sums of the losses of either kind as they enter the total,
        median over the seeds; what was not logged is absent.
    """
    runs = [_sums(folder) for folder in folders]
    found = {}
    for kind in ("detection", "distillation"):
        if curve := median_curve([run[kind] for run in runs]):
            found[kind] = curve
    return found


def median_curve(curves: Sequence[Curve]) -> Curve:
    """Return the median over the curves at every iteration that any of them has, in order."""
    iterations = sorted({i for curve in curves for i in curve})
    return {i: median(c[i] for c in curves if i in c) for i in iterations}


def _sums(folder: Path) -> dict[str, Curve]:
    sums: dict[str, Curve] = {"detection": {}, "distillation": {}}
    for record in read_records(folder):
        if "total_loss" not in record:
            continue  # a line with some quantities alone
        losses = {k: float(v) for k, v in record.items() if k.startswith("loss")}
        distilled = [v for k, v in losses.items() if k.startswith(_DISTILLATION)]
        at = int(record["iteration"])
        if distilled:
            sums["distillation"][at] = sum(distilled)
        if len(losses) > len(distilled):
            sums["detection"][at] = sum(losses.values()) - sum(distilled)
    return sums
