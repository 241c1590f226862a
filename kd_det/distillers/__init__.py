"""Distillers: one published technique per module. Importing the package registers them all."""

from kd_det.distillers.base import (
    DISTILLER_REGISTRY,
    CaptureSpec,
    Distiller,
    Pair,
    Step,
    Targets,
    build_distiller,
    loss_key,
)
from kd_det.distillers.feature_lp import FeatureLp

__all__ = [
    "DISTILLER_REGISTRY",
    "CaptureSpec",
    "Distiller",
    "FeatureLp",
    "Pair",
    "Step",
    "Targets",
    "build_distiller",
    "loss_key",
]
