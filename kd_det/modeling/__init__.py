"""Detectors, backbones and necks that Detectron2 lacks. Importing it registers them."""

from kd_det.modeling import (  # noqa: F401
    aligned,
    atss,
    fcos,
    fpn,
    gfl,
)
