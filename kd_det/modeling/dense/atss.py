"""
ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020).

One square anchor per position, adaptive sample selection (`atss_assigner`), sigmoid focal loss,
GIoU loss, and a quality branch on the box tower: centerness, which also weighs the GIoU loss, as in
the paper, or the IoU of the predicted box with its ground truth, as PGD (ECCV 2022) uses it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.boxes import aligned_giou, aligned_iou, box_centers, centerness
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.atss_assigner import Positives
from kd_det.modeling.dense.single_anchor import SingleAnchorDetector
from kd_det.modeling.dense.single_anchor_options import SingleAnchorOptions
from kd_det.modeling.registering import register_in

QUALITY_BRANCHES = ("centerness", "iou", "iou_weighted")


@dataclass(frozen=True, kw_only=True)
class AtssOptions(SingleAnchorOptions):
    """
    Keys of MODEL.ATSS (CVPR 2020), beside those of `SingleAnchorOptions`.

    Raises:
        ValueError: an unknown quality branch.
    """

    node = "ATSS"

    # What the third branch predicts: "centerness" (the paper), which also weighs the GIoU loss of
    # each positive; "iou", the IoU of the predicted box with its object, every positive's GIoU loss
    # counting the same (PGD, ECCV 2022); or "iou_weighted", where the IoU weighs the GIoU loss too,
    # so that boxes far from their object hardly move. A detection's score is
    # sqrt(class * quality).
    quality_branch: str = "centerness"
    # Factor of that branch's loss (binary cross-entropy).
    quality_loss_weight: float = 1.0
    # Multiples of (dx, dy, dw, dh) that the box branch predicts.
    bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    focal_loss_alpha: float = 0.25
    focal_loss_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality_branch not in QUALITY_BRANCHES:
            raise ValueError(
                f"MODEL.ATSS.QUALITY_BRANCH is {self.quality_branch!r}, expected one of "
                f"{', '.join(QUALITY_BRANCHES)}."
            )


@register_in(META_ARCH_REGISTRY)
class ATSS(SingleAnchorDetector):
    """
    ATSS, built from yaml by the keys MODEL.ATSS.

    Training gives `loss_atss_cls` (focal, over the moving average of positives), `loss_atss_loc`
    (GIoU: the mean over the positives, for "centerness" and "iou_weighted" with the quality targets
    as weights) and `loss_atss_quality` (binary cross-entropy, over the moving average of
    positives). A detection's score is sqrt(class probability * quality); the threshold is on the
    class probability alone, as in FCOS.
    """

    options: AtssOptions
    options_type = AtssOptions
    with_quality = True

    @cached_property
    def box2box_transform(self) -> Box2BoxTransform:
        """From anchors and box outputs to boxes."""
        return Box2BoxTransform(weights=tuple(self.options.bbox_reg_weights))

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs are R-CNN's (dx, dy, dw, dh)."""
        return self.box2box_transform.apply_deltas(outputs, anchors)

    def scores(self, probabilities: Tensor, quality: Tensor | None) -> Tensor:
        """See `SinglePredictionDetector.scores`: sqrt(probability * quality)."""
        assert quality is not None
        return (probabilities * quality.sigmoid()).sqrt()

    def losses(
        self, flat: list[Tensor], positives: Positives, normalizer: float
    ) -> dict[str, Tensor]:
        """See `SingleAnchorDetector.losses`."""
        logits, box_outputs, quality = flat
        ones = logits.new_ones(len(positives.index))
        loss_cls = sigmoid_focal_loss(
            logits,
            self.class_targets(logits, positives, ones),
            alpha=self.options.focal_loss_alpha,
            gamma=self.options.focal_loss_gamma,
            reduction="sum",
        )
        boxes = self.decode_boxes(box_outputs[positives.index], positives.anchors)
        target = self._quality_targets(boxes, positives)
        weight = ones if self.options.quality_branch == "iou" else target
        distance = 1 - aligned_giou(boxes, positives.boxes)
        total = mean_over_processes(weight.sum()).clamp(min=1e-6)
        loss_loc = (weight * distance).sum() / total
        loss_quality = F.binary_cross_entropy_with_logits(
            quality[positives.index, 0], target, reduction="sum"
        )
        return {
            "loss_atss_cls": loss_cls / normalizer,
            "loss_atss_loc": self.options.bbox_loss_weight * loss_loc,
            "loss_atss_quality": self.options.quality_loss_weight * loss_quality / normalizer,
        }

    @torch.no_grad()
    def _quality_targets(self, boxes: Tensor, positives: Positives) -> Tensor:
        if self.options.quality_branch == "centerness":
            return centerness(box_centers(positives.anchors), positives.boxes)
        return aligned_iou(boxes, positives.boxes)
