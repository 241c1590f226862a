"""Detectors, backbones and necks that Detectron2 lacks. Importing it registers them."""

from kd_det.modeling.backbones import fpn  # noqa: F401
from kd_det.modeling.dense import atss, decoding, fcos, gfl  # noqa: F401
from kd_det.modeling.msad import aligned  # noqa: F401
