"""
CWD: where in the image each channel looks.

Paper: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021
(arXiv 2011.13256).

    L = sum over levels of  tau^2 / (N C) * sum over images and channels of  KL(q || p)

q and p are softmaxes of each channel over the cells of the level, of teacher and student
(`functional.cwd`). The maps are the neck's, or the head's class logits before the sigmoid.
"""

from dataclasses import replace
from typing import Literal

from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Pair
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.cwd import channel_divergence
from kd_det.functional.distance import masked_standardize

Features = Literal["neck", "logits"]


@DISTILLER_REGISTRY.register()
class CWD(PyramidDistiller):
    """Sum over paired levels of the channels' divergence."""

    config_key = "CWD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.CWD. Published weights: 10 for the neck, 5 for class logits."""
        super().add_config(node)
        # What is compared: "neck", the pyramids of STUDENT_CAPTURE and TEACHER_CAPTURE; or
        # "logits", the class logits of two dense heads of equal classes and anchors, where those
        # keys and ADAPTER play no part.
        node.FEATURES = "neck"
        # Module path of the class logits in both models, for "logits".
        node.LOGITS_CAPTURE = "head.cls_score"
        # Temperature; larger ones look at more cells.
        node.TAU = 1.0
        # Standardise each channel of both maps over the image first (RTMDet's recipe).
        node.NORMALIZE = False

    def __init__(
        self,
        *,
        features: Features = "neck",
        logits_capture: str = "head.cls_score",
        tau: float = 1.0,
        normalize: bool = False,
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            features, logits_capture, tau, normalize: as the keys of KD.CWD.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: unknown features, or a temperature that is not positive.
        """
        logits = features == "logits"
        super().__init__(
            mask_padding=mask_padding,
            student_capture=logits_capture if logits else student_capture,
            teacher_capture=logits_capture if logits else teacher_capture,
            adapter=adapter,
        )
        if logits:
            advice = (
                "KD.CWD.FEATURES is 'logits': take a teacher with as many classes and anchors as "
                "the student, or FEATURES 'neck'."
            )
            self.spec = replace(self.spec, adapter="never", advice=advice)
        expect_choice("KD.CWD.FEATURES", features, Features)
        expect_number("KD.CWD.TAU", tau, low=1e-6)
        self.uses_class_scores = logits
        self.tau = tau
        self.normalize = normalize

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return the divergence of a pair's channels."""
        student, teacher = pair.student, pair.teacher
        if self.normalize:
            student, teacher = (masked_standardize(x, mask=mask) for x in (student, teacher))
        return channel_divergence(student, teacher, tau=self.tau, mask=mask)
