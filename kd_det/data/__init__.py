"""Data sets: the built-in ones, the user's own, and their checks."""

from kd_det.data.catalog import register_builtin as _register_builtin_coco
from kd_det.data.catalog import register_coco_style, register_from_config
from kd_det.data.crowdhuman import register_builtin_crowd, register_crowdhuman
from kd_det.data.mapper import CheckedDatasetMapper

__all__ = [
    "CheckedDatasetMapper",
    "register_builtin",
    "register_coco_style",
    "register_crowdhuman",
    "register_from_config",
]


def register_builtin() -> None:
    """Register every data set that kd_det knows by name. Safe to call again."""
    _register_builtin_coco()
    register_builtin_crowd()
