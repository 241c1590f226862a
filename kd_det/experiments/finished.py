"""When a run counts as finished: its result, its detections and its final checkpoint are there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_det.experiments.digests import checkpoint_damage, digest_of
from kd_det.experiments.plan import Run
from kd_det.files import read_json, write_json

_INPUTS = "inputs.json"
_KEYS = {"metrics", "sec_per_step", "peak_memory_mb", "iterations"}


def read_result(run: Run) -> dict[str, Any] | None:
    """Return the result of a finished run, None where any part of it is missing or damaged."""
    return None if what_lacks(run) else read_json(_result(run))


def what_lacks(run: Run) -> str:
    """
    Return what keeps a run from being finished, for humans; "" where nothing does.

    Detections are not read as a whole: a JSON list has its two ends. A checkpoint is compared with
    its checksums when it is new.
    """
    if not _result(run).exists():
        return "no result.json yet"
    if not _is_result(read_json(_result(run))):
        return "its result.json is damaged"
    if not _is_list(detections_file(run.folder)):
        return "its detections are missing or damaged"
    if run.iterations and checkpoint_damage(run.checkpoint):
        return f"its {run.checkpoint.name} is missing or damaged"
    return made_from_others(run)


def note_inputs(run: Run) -> None:
    """Write down which checkpoints of other runs a run that starts now reads."""
    write_json(run.folder / _INPUTS, {other.title: _digest(other) for other in run.needs})


def made_from_others(run: Run) -> str:
    """Say which run that this one needs has another final checkpoint now; "" where none has."""
    noted = read_json(run.folder / _INPUTS) or {}
    for other in run.needs:
        before, now = noted.get(other.title), _digest(other)
        if before and now and before != now:
            return f"it was made from another checkpoint of {other.title}"
    return ""


def set_aside(run: Run) -> Path:
    """Rename the folder of a run that is to start afresh; return where it is now."""
    number = 1
    while (target := run.folder.with_name(f"{run.folder.name}.stale-{number}")).exists():
        number += 1
    return run.folder.rename(target)


def _digest(run: Run) -> str:
    """Return the digest of a run's final checkpoint; "" where it is to be made (again)."""
    return "" if checkpoint_damage(run.checkpoint) else digest_of(run.checkpoint)


def detections_file(folder: Path) -> Path:
    """Return where a run leaves its detections, in COCO's results format."""
    return folder / "inference" / "coco_instances_results.json"


def _result(run: Run) -> Path:
    return run.folder / "result.json"


def _is_result(content: Mapping[str, Any] | None) -> bool:
    if content is None or not content.keys() >= _KEYS:
        return False
    metrics = content["metrics"]
    boxes = metrics.get("bbox") if isinstance(metrics, Mapping) else None
    return isinstance(boxes, Mapping) and "AP" in boxes


def _is_list(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            first = stream.read(1)
            stream.seek(-2, 2)
            last = stream.read().strip()[-1:]
    except OSError:  # absent, or shorter than two bytes
        return False
    return (first, last) == (b"[", b"]")
