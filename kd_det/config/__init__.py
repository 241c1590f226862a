"""The keys that kd_det and its plugins add to Detectron2's, and how a config file is read."""

from kd_det.config.keys import add_kd_config
from kd_det.config.reading import changed_settings, load_config
from kd_det.config.roles import (
    inherits,
    is_distillation,
    needs_teacher,
    starts_trained,
    student_cfg,
)
from kd_det.config.shipping import stock_cfg

__all__ = [
    "add_kd_config",
    "changed_settings",
    "inherits",
    "is_distillation",
    "load_config",
    "needs_teacher",
    "starts_trained",
    "stock_cfg",
    "student_cfg",
]
