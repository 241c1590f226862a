"""Distillers: one published technique per module. Importing the package registers them all."""

from kd_det.distillers.base import (
    DISTILLER_REGISTRY,
    CaptureSpec,
    Distiller,
    Pair,
    Step,
    Targets,
    build_distiller,
    distiller_class,
    node_name,
)
from kd_det.distillers.feature_lp import FeatureLp
from kd_det.distillers.msad import AlignedPyramid
from kd_det.distillers.pgd import PGD
from kd_det.distillers.predictions import DensePredictions, register_decoder
from kd_det.distillers.ssim import SSIM

__all__ = [
    "DISTILLER_REGISTRY",
    "PGD",
    "SSIM",
    "AlignedPyramid",
    "CaptureSpec",
    "DensePredictions",
    "Distiller",
    "FeatureLp",
    "Pair",
    "Step",
    "Targets",
    "build_distiller",
    "distiller_class",
    "node_name",
    "register_decoder",
]
