"""
L1/L2 distance between paired feature maps: the baseline every paper compares with.

    L = sum over pairs of  mean over n, c, h, w of  |S - T|^p

(FitNets, Romero et al., ICLR 2015, on every level of a pyramid.) With `normalize`, each channel of
both maps is first standardised over the image, so that L2 is twice one minus their correlation
(PKD, Cao et al., NeurIPS 2022, takes half of it and the moments of the whole batch). With DISTANCE
"cosine" it is the mean over cells of 1 - cos(S, T) over channels instead, which knows no lengths:
for teachers whose numbers are of another size, as a ViT's.
"""

from typing import Literal

from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Pair
from kd_det.distillers.checks import expect_choice
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.distance import cosine_distance, masked_standardize, mean_distance

Distance = Literal["lp", "cosine"]


@DISTILLER_REGISTRY.register()
class FeatureLp(PyramidDistiller):
    """Sum over paired levels of the mean L1, L2 or cosine distance."""

    config_key = "FEATURE_LP"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.FEATURE_LP."""
        super().add_config(node)
        # "lp": the mean of |S - T|^P; "cosine": that of 1 - cos(S, T) over the channels of a cell.
        node.DISTANCE = "lp"
        # Exponent of the distance "lp": 1 or 2.
        node.P = 2
        # Standardise each channel of both maps over the image first.
        node.NORMALIZE = False

    def __init__(
        self,
        *,
        distance: Distance = "lp",
        p: int = 2,
        normalize: bool = False,
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            distance: "lp" or "cosine".
            p: exponent of the distance "lp", 1 or 2.
            normalize: standardise each channel over the image first.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: p is neither 1 nor 2, or an unknown distance.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
        )
        if p not in (1, 2):
            raise ValueError(f"KD.FEATURE_LP.P is {p}, expected 1 or 2.")
        expect_choice("KD.FEATURE_LP.DISTANCE", distance, Distance)
        self.p = p
        self.kind = distance
        self.normalize = normalize

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return the mean distance of a pair."""
        student, teacher = pair.student, pair.teacher
        if self.normalize:
            student, teacher = (masked_standardize(x, mask=mask) for x in (student, teacher))
        if self.kind == "cosine":
            return cosine_distance(student, teacher, mask=mask)
        return mean_distance(student, teacher, p=self.p, mask=mask)
