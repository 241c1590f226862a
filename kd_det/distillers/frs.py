"""
FRS: imitate features and scores where the teacher sees something.

Paper: Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021
(arXiv 2111.00674). The richness W of a cell is the teacher's highest class probability there:

    L = sum over levels of  ALPHA * sum W |T - phi(S)|^2 / sum W
                         +  BETA  * sum W sum_d b(z^S_d, sigmoid(z^T_d)) / sum W

phi is a 3x3 convolution, b the binary cross-entropy less the teacher's entropy
(`functional.frs`).
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, CaptureSpec, Pair, Step
from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.frs import feature_loss, head_loss, richness
from kd_det.functional.level_grid import same_stride
from kd_det.functional.moments import Scope


@DISTILLER_REGISTRY.register()
class FRS(PyramidDistiller):
    """Features ("feat") and class scores ("head"), weighted by the teacher's scores."""

    config_key = "FRS"
    adapter_kernel = 3
    adapter_bias = True

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.FRS. Values of ALPHA and BETA are RetinaNet's."""
        super().add_config(node)
        # The published linear warm-up.
        node.SCHEDULE.WARMUP_ITERS = 500
        # 3x3 convolution from the student's channels to the teacher's: "always" (published, also
        # for equal channels), "auto" or "never".
        node.ADAPTER = "always"
        # Weights of features and class scores: RetinaNet .005 / .02, GFL .1 / .05, FCOS .01 / .05,
        # Faster R-CNN .002 / .1. With BETA 0 student and teacher may have different heads and
        # classes.
        node.ALPHA = 0.005
        node.BETA = 0.02
        # Module path of the class scores in both models; of an R-CNN
        # "proposal_generator.rpn_head.objectness_logits".
        node.SCORES_CAPTURE = "head.cls_score"
        # One ratio per "image" (the paper's formula), or over the "batch" (the release).
        node.SCOPE = "image"

    def __init__(
        self,
        *,
        alpha: float = 0.005,
        beta: float = 0.02,
        scores_capture: str = "head.cls_score",
        scope: Scope = "image",
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "always",
    ) -> None:
        """
        Args:
            alpha, beta, scores_capture, scope: as the keys of KD.FRS.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: an unknown scope, or a weight that is no number from 0 on.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
        )
        expect_choice("KD.FRS.SCOPE", scope, Scope)
        expect_number("KD.FRS.ALPHA", alpha)
        expect_number("KD.FRS.BETA", beta)
        # An RPN's scores know no classes.
        self.uses_class_scores = beta > 0 and not scores_capture.endswith("objectness_logits")
        self.alpha = alpha
        self.beta = beta
        self.scores = scores_capture
        self.scope: Scope = scope

    def captures(self) -> Sequence[CaptureSpec]:
        """Return the pyramids, the teacher's scores and, where they are compared, both scores."""
        specs = [self.spec, CaptureSpec("richness", None, self.scores)]
        if self.beta > 0:
            advice = (
                "FRS compares class scores: take a teacher with as many classes and anchors as the "
                "student, or KD.FRS.BETA 0 to compare features alone."
            )
            specs.append(
                CaptureSpec("scores", self.scores, self.scores, adapter="never", advice=advice)
            )
        return specs

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """Check that the teacher has scores wherever features are compared."""
        scored = [level.stride for level in levels["richness"]]
        for level in levels[self.spec.name]:
            if not any(same_stride(level.stride, stride) for stride in scored):
                raise ValueError(
                    f"KD.FRS: the levels {level.name} have stride {level.stride:g}, but the "
                    f"teacher's {self.scores} has scores at strides "
                    f"{', '.join(f'{stride:g}' for stride in scored)} only; set "
                    "KD.FRS.SCORES_CAPTURE to scores of all levels, or the captures to pyramids "
                    "of fewer."
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the losses "feat" and, with BETA, "head"."""
        weights = {level.stride: richness(level.map) for level in step.maps["richness"]}
        features = [
            feature_loss(
                pair.student,
                pair.teacher,
                _on_grid(weights, pair),
                scope=self.scope,
                mask=pair.valid() if self.mask_padding else None,
            )
            for pair in step.pairs[self.spec.name]
        ]
        losses = {"feat": torch.stack(features).sum() * self.alpha}
        if self.beta > 0:
            scores = [
                head_loss(
                    pair.student,
                    pair.teacher,
                    richness(pair.teacher),
                    scope=self.scope,
                    mask=pair.valid() if self.mask_padding else None,
                )
                for pair in step.pairs["scores"]
            ]
            losses["head"] = torch.stack(scores).sum() * self.beta
        return losses


def _on_grid(weights: dict[float, Tensor], pair: Pair) -> Tensor:
    """Return W at the cells of a pair; what is cut off is padding."""
    found = next(w for stride, w in weights.items() if same_stride(stride, pair.stride))
    height, width = pair.student.shape[-2:]
    return found[..., :height, :width]
