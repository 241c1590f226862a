"""Distillers: one published technique per module. Importing the package registers them all."""

from kd_det.distillers.base import (
    DISTILLER_REGISTRY,
    CaptureSpec,
    Distiller,
    Pair,
    Step,
    Targets,
    TeacherMap,
    build_distiller,
    distiller_class,
    node_name,
)
from kd_det.distillers.bckd import BCKD
from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.crosskd import CrossKD
from kd_det.distillers.cwd import CWD
from kd_det.distillers.feature_lp import FeatureLp
from kd_det.distillers.fgd import FGD
from kd_det.distillers.frs import FRS
from kd_det.distillers.ld import LD
from kd_det.distillers.mgd import MGD
from kd_det.distillers.msad import AlignedPyramid
from kd_det.distillers.pgd import PGD
from kd_det.distillers.pkd import PKD
from kd_det.distillers.predictions import DensePredictions, PredictionPair, register_decoder
from kd_det.distillers.ssim import SSIM

__all__ = [
    "BCKD",
    "CWD",
    "DISTILLER_REGISTRY",
    "FGD",
    "FRS",
    "LD",
    "MGD",
    "PGD",
    "PKD",
    "SSIM",
    "AlignedPyramid",
    "CaptureSpec",
    "CrossKD",
    "DensePredictions",
    "Distiller",
    "FeatureLp",
    "LevelShape",
    "Pair",
    "PredictionPair",
    "Step",
    "Targets",
    "TeacherMap",
    "TeacherModule",
    "build_distiller",
    "distiller_class",
    "node_name",
    "register_decoder",
]
