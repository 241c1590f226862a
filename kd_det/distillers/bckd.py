"""
BCKD: class scores as binary problems, boxes by their overlap.

Paper: Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
Detection", ICCV 2023 (arXiv 2308.14286). With d the difference of student's and teacher's class
probabilities at a position, and N+ the number of positives:

    L = CLS_WEIGHT / N+ * sum d^beta CE(z^S, sigmoid(z^T))
      + LOC_WEIGHT / N+ * sum max_k d * (1 - GIoU(b^S, b^T))

over all positions of two dense heads on the same grid (`functional.bckd`).
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, CaptureSpec, Distiller, Step
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.functional.bckd import Overlap, classification_loss, localization_loss
from kd_det.functional.scores import confidence, score_gap


@DISTILLER_REGISTRY.register()
class BCKD(Distiller):
    """Class scores ("cls") and boxes ("loc") of two dense heads, position by position."""

    config_key = "BCKD"
    share = share_of_trained = 1.0
    uses_class_scores = True

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.BCKD; values are the release's, the same for all detectors."""
        super().add_config(node)
        # Module path, in both models, of the dense head.
        node.HEAD = "head"
        # Weights of class scores and boxes.
        node.CLS_WEIGHT = 1.0
        node.LOC_WEIGHT = 4.0
        # Exponent of the difference of probabilities.
        node.BETA = 1.0
        # How boxes are compared: "giou" (release) or "iou" (paper).
        node.BOX = "giou"
        # Leave positions on the padding of a batch out (release).
        node.MASK_PADDING = True

    def __init__(
        self,
        *,
        head: str = "head",
        cls_weight: float = 1.0,
        loc_weight: float = 4.0,
        beta: float = 1.0,
        box: Overlap = "giou",
        mask_padding: bool = True,
    ) -> None:
        """
        Args: as the keys of KD.BCKD.

        Raises:
            ValueError: a value out of its range; the message names the key.
        """
        super().__init__()
        expect_choice("KD.BCKD.BOX", box, Overlap)
        expect_number("KD.BCKD.CLS_WEIGHT", cls_weight)
        expect_number("KD.BCKD.LOC_WEIGHT", loc_weight)
        expect_number("KD.BCKD.BETA", beta)
        self.spec = CaptureSpec("predictions", head, head, "predictions")
        self.cls_weight = cls_weight
        self.loc_weight = loc_weight
        self.beta = beta
        self.box: Overlap = box
        self.mask_padding = mask_padding

    def captures(self) -> Sequence[CaptureSpec]:
        """Return the predictions of both."""
        return [self.spec]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the losses "cls" and "loc"."""
        pairs = step.predictions[self.spec.name]
        normalizer = step.normalizer(
            lambda: torch.stack(
                [(confidence(p.teacher.logits) * p.valid()).sum() for p in pairs]
            ).sum()
        )
        classes, boxes = [], []
        for pair in pairs:
            valid = pair.valid() if self.mask_padding else None
            logits = pair.student.logits, pair.teacher.logits
            classes.append(
                classification_loss(*logits, normalizer=normalizer, beta=self.beta, valid=valid)
            )
            boxes.append(
                localization_loss(
                    pair.student.boxes,
                    pair.teacher.boxes,
                    score_gap(*logits),
                    normalizer=normalizer,
                    overlap=self.box,
                    valid=valid,
                )
            )
        return {
            "cls": torch.stack(classes).sum() * self.cls_weight,
            "loc": torch.stack(boxes).sum() * self.loc_weight,
        }
