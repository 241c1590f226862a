"""One tiny GFL student that all of kd_det's distillers act on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_msad
import tiny_runs

from kd_det.distillers import DISTILLER_REGISTRY

# Those that register when the package is imported; tests and plugins add theirs.
NAMES = sorted(n for n, c in DISTILLER_REGISTRY if c.__module__.startswith("kd_det.distillers."))
_NARROW = {
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.NORM": "FrozenBN",  # one pixel has no statistics
}
_REDUCED = {**tiny_msad._pyramid(2, 6), "MODEL.GFL.IN_FEATURES": [f"p{i}" for i in range(2, 7)]}


#: Keys of both models: two levels in place of five.
SHALLOW = {
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4"],
    "MODEL.FPN.TOP_BLOCK": "none",
    "MODEL.GFL.IN_FEATURES": ["p3", "p4"],
}


def write_student(
    folder: Path, *, factor: int = 1, both: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    """
    Write a teacher and its student, and return the student's config file.

    Args:
        folder: where all files go.
        factor: by which the student's view of the image is reduced.
        both: keys of both models.
        more: keys of the student.
    """
    own = {**_NARROW, **(both or {})}
    teacher = tiny_runs.make_teacher(folder, "gfl", **own)
    keys = {
        **tiny_runs.distil_keys("gfl", teacher),
        **own,
        **(_REDUCED if factor > 1 else {}),
        "KD.STUDENT.VIEW_FACTOR": float(factor),
        "KD.DISTILLERS": NAMES,
        "KD.ALIGNED_PYRAMID.TEACHER_CAPTURE": "backbone",
        "KD.CROSSKD.REUSE_FROM": 1,  # of two convolutions
        **more,
    }
    return tiny_runs.write_config(folder / f"student{factor}.yaml", "gfl", keys)
