"""
kd_det: knowledge distillation for Detectron2.

Importing it registers everything with Detectron2.
"""

from kd_det import compat

compat.install()

from kd_det import data, distillation, distillers, modeling, zoo  # noqa: E402
from kd_det.distillation import (  # noqa: E402
    DistillationDetector,
    Teacher,
    Weighted,
    distill,
    load_teacher,
)

data.register_builtin()
zoo.register_handler()

__version__ = "0.1.0"
__all__ = [
    "DistillationDetector",
    "Teacher",
    "Weighted",
    "data",
    "distill",
    "distillation",
    "distillers",
    "load_teacher",
    "modeling",
    "zoo",
]
