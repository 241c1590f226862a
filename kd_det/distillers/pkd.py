"""
PKD: correlation of paired feature maps.

Paper: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022 (arXiv 2207.02039).

    L = sum over levels of  1 / (2 C m) * sum (z^S - z^T)^2  =  mean over channels of 1 - Pearson r

z are the maps with each channel standardised over the m cells of the batch. Magnitudes do not
matter, so detectors of different kinds teach each other (`functional.pkd` has the formula).
"""

from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Pair
from kd_det.distillers.checks import expect_choice
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.moments import Scope
from kd_det.functional.pkd import pearson_distance


@DISTILLER_REGISTRY.register()
class PKD(PyramidDistiller):
    """Sum over paired levels of one minus the correlation."""

    config_key = "PKD"
    share_of_kin = 3.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.PKD. Published weights: 6 (two-stage teacher), 10 (one-stage)."""
        super().add_config(node)
        # The finest n pairs of levels; 0 for all. The release takes four of the five.
        node.LEVELS = 4
        # What a channel is standardised over: the "batch" of a process (published), or each "image"
        # (for one image per process, or where the loss must not depend on the batch).
        node.SCOPE = "batch"

    def __init__(
        self,
        *,
        levels: int = 4,
        scope: Scope = "batch",
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            levels: only the finest n pairs; 0 for all.
            scope: "batch" or "image".
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: an unknown scope, or a negative number of levels.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
            levels=levels,
        )
        expect_choice("KD.PKD.SCOPE", scope, Scope)
        self.scope = scope

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return one minus the correlation of a pair, averaged over channels."""
        return pearson_distance(pair.student, pair.teacher, mask=mask, scope=self.scope)
