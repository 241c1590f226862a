"""Tiny aligned teachers and the students of their reduced view."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_runs
from detectron2.config import CfgNode
from tiny_runs import META, TinyTeacher

from kd_det.config import load_config

MakeAligned = Callable[..., TinyTeacher]


def _pyramid(first: int, last: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(first, last + 1)]
    stages = ["res2", "res3", "res4", "res5"]
    return {
        "MODEL.RESNETS.OUT_FEATURES": stages,
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.FPN.TOP_BLOCK": {5: "none", 6: "p6_c5", 7: "p6p7_c5"}[last],
        "MODEL.FCOS.IN_FEATURES": names,
        "MODEL.RETINANET.IN_FEATURES": names,
        "MODEL.RPN.IN_FEATURES": names,
        "MODEL.ROI_HEADS.IN_FEATURES": names[:-1],
    }


def teacher_keys(detector: str, factor: int = 2) -> dict[str, Any]:
    """Config keys of an aligned teacher: levels up to p7 in the full view."""
    return {
        **_pyramid(factor.bit_length() + 1, 7),
        "MODEL.META_ARCHITECTURE": "AlignedMultiScaleDetector",
        "MODEL.ALIGNED.META_ARCHITECTURE": META[detector],
        "MODEL.ALIGNED.FACTOR": factor,
    }


def reduced_keys(detector: str, teacher: TinyTeacher | None, factor: int = 2) -> dict[str, Any]:
    """Config keys of a student of the reduced view: levels from p2, nearest, no distiller yet."""
    keys = {
        **tiny_runs.distil_keys(detector, teacher),
        **_pyramid(2, 8 - factor.bit_length()),
        "KD.STUDENT.VIEW_FACTOR": float(factor),
        "KD.STUDENT.VIEW_INTERPOLATION": "nearest",
        "KD.ALIGNED_PYRAMID.WEIGHT": 0.6,
        "KD.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS": 0,
        # Of random weights, nearly any box is found.
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    }
    if teacher is not None:
        sizes = load_config(str(teacher.config_file)).MODEL.ANCHOR_GENERATOR.SIZES
        keys["MODEL.ANCHOR_GENERATOR.SIZES"] = [[s / factor for s in level] for level in sizes]
    return keys


def msad_keys(detector: str, teacher: TinyTeacher, factor: int = 2) -> dict[str, Any]:
    """Config keys of MSAD's second stage, without warm-up."""
    own = {"KD.DISTILLERS": ["AlignedPyramid"], "KD.INHERIT": ["*"]}
    return {**reduced_keys(detector, teacher, factor), **own}


def msad_cfg(path: Path, detector: str, teacher: TinyTeacher, **keys: Any) -> CfgNode:
    """Write and load the config of a student as wide as its teacher."""
    merged = {**msad_keys(detector, teacher), **keys}
    return load_config(str(tiny_runs.write_config(path, detector, merged, r50=True)))
