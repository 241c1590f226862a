"""
MSAD's second stage: a student that sees a reduced image learns a full-resolution pyramid.

Paper: Qi et al., "Multi-Scale Aligned Distillation for Low-Resolution Detection", CVPR 2021.

    L = 0.6 * min(1, t / 500) * sum over paired levels of  mean |P^S - P^T|

P^S are the student's levels p2..p6 of the reduced view, P^T the teacher's fused pyramid on the same
grids (p3..p7 of the full view, blended with its own p2..p6 of the reduced one). The coefficient is
alpha * T^2 / T with the paper's alpha 0.2 and temperature 3. An ordinary high-resolution detector
teaches in the same way, with its p3..p7.
"""

from dataclasses import replace

from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Pair
from kd_det.distillers.pyramid import DISTANCES, PyramidDistiller


@DISTILLER_REGISTRY.register()
class AlignedPyramid(PyramidDistiller):
    """
    Sum over paired levels of a distance to the teacher's aligned pyramid.

    A preset of the pyramid distiller: the distances are those of all, the defaults are the paper's
    but for the warm-up of 500 iterations, which belongs to its WEIGHT and its schedule: set
    SCHEDULE.WARMUP_ITERS beside a WEIGHT, as configs/coco/msad do.
    """

    config_key = "ALIGNED_PYRAMID"
    share_of_trained = 1.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.ALIGNED_PYRAMID."""
        super().add_config(node)
        # "fusion": the aligned teacher's fused pyramid; "detector.backbone@0" / "@1": its pyramid
        # of the full / reduced view (its MODEL.ALIGNED.EVAL_BRANCH must be "fused": the others run
        # one view only); "backbone": an ordinary teacher's.
        node.TEACHER_CAPTURE = "fusion"
        # "l1" (paper), "l2", "smooth_l1", "cosine" or "ssim".
        node.LOSS = "l1"

    def __init__(
        self,
        *,
        loss: str = "l1",
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "fusion",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            loss: "l1" (paper), "l2", "smooth_l1", "cosine" or "ssim".
            mask_padding: average over the cells on the image only (paper: off).
            student_capture: module path of the student's pyramid.
            teacher_capture: "fusion" is the aligned teacher's fused pyramid, "detector.backbone@0"
                its full-resolution one, "detector.backbone@1" its reduced one; "backbone" serves an
                ordinary teacher.
            adapter: when the student's maps pass a 1x1 convolution.

        Raises:
            ValueError: the loss has no such name.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
        )
        if loss not in DISTANCES:
            raise ValueError(
                f"KD.ALIGNED_PYRAMID.LOSS is {loss!r}, expected one of {', '.join(DISTANCES)}."
            )
        self.loss = loss
        if teacher_capture == "fusion":
            advice = "Of an ordinary teacher set KD.ALIGNED_PYRAMID.TEACHER_CAPTURE to 'backbone'."
            self.spec = replace(self.spec, advice=advice)

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return the distance of a pair."""
        return DISTANCES[self.loss](pair.student, pair.teacher, mask=mask)
