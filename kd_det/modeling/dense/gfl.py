"""
GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020): one score for class and quality at once.

The class score is trained towards the IoU of the predicted box (quality focal loss); each side of
a box is a distribution over distances 0 .. reg_max strides from the anchor's centre (distribution
focal loss), and the box is read off as its mean. Assignment is that of ATSS.
"""

from dataclasses import dataclass, replace

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from kd_det.distillers.predictions import DensePredictions, HeadOutputs, register_decoder
from kd_det.functional.boxes import aligned_giou, aligned_iou, box_centers
from kd_det.functional.focal import (
    distribution_focal_loss,
    distribution_mean,
    quality_focal_loss,
)
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.atss_assigner import Positives
from kd_det.modeling.dense.decoding import decode_levels
from kd_det.modeling.dense.single_anchor import SingleAnchorDetector
from kd_det.modeling.dense.single_anchor_options import SingleAnchorOptions
from kd_det.modeling.registering import register_in


@dataclass(frozen=True, kw_only=True)
class GflOptions(SingleAnchorOptions):
    """
    Keys of MODEL.GFL (NeurIPS 2020), beside those of `SingleAnchorOptions`.

    Raises:
        ValueError: no distance at all.
    """

    node = "GFL"

    # Largest distance from an anchor's centre to a side of its box, in strides of the level; each
    # side is a distribution over 0 .. REG_MAX.
    reg_max: int = 16
    # Exponent of the quality focal loss.
    quality_focal_beta: float = 2.0
    # Factor of the distribution focal loss.
    dfl_loss_weight: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_counts("reg_max")

    def box_outputs(self) -> int:
        """Return the bins of left, top, right and bottom together."""
        return 4 * (self.reg_max + 1)


@register_in(META_ARCH_REGISTRY)
class GFL(SingleAnchorDetector):
    """
    GFL, built from yaml by the keys MODEL.GFL.

    Training gives `loss_gfl_cls` (quality focal loss over the moving average of positives), and
    `loss_gfl_loc` (GIoU) and `loss_gfl_dfl` (mean over the 4 sides), both weighted by the
    positive's own highest class score, detached, and divided by the batch's sum of these weights,
    at least 1.
    A detection's score is its class score. The anchors' size matters to assignment alone.
    """

    options: GflOptions
    options_type = GflOptions
    with_quality = False

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs: logits of the sides' bins."""
        distances = distribution_mean(self._bins(outputs)) * self._strides(anchors)
        centers = box_centers(anchors)
        return torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], dim=1)

    def losses(
        self, flat: list[Tensor], positives: Positives, normalizer: float
    ) -> dict[str, Tensor]:
        """See `SingleAnchorDetector.losses`."""
        logits, box_outputs = flat
        outputs = box_outputs[positives.index]
        boxes = self.decode_boxes(outputs, positives.anchors)
        quality = aligned_iou(boxes.detach(), positives.boxes)
        targets = self.class_targets(logits, positives, quality)
        loss_cls = quality_focal_loss(logits, targets, self.options.quality_focal_beta).sum()

        weight = logits.detach()[positives.index].amax(dim=1).sigmoid()
        total = mean_over_processes(weight.sum()).clamp(min=1)
        loss_loc = (weight * (1 - aligned_giou(boxes, positives.boxes))).sum() / total
        sides = distribution_focal_loss(self._bins(outputs), self._distances(positives))
        loss_dfl = (weight * sides.mean(dim=1)).sum() / total
        return {
            "loss_gfl_cls": loss_cls / normalizer,
            "loss_gfl_loc": self.options.bbox_loss_weight * loss_loc,
            "loss_gfl_dfl": self.options.dfl_loss_weight * loss_dfl,
        }

    def _distances(self, positives: Positives) -> Tensor:
        """Return (P, 4) distances of the sides from the anchors' centres, in strides."""
        centers = box_centers(positives.anchors)
        low, high = centers - positives.boxes[:, :2], positives.boxes[:, 2:] - centers
        distances = torch.cat([low, high], dim=1) / self._strides(positives.anchors)
        return distances.clamp(min=0, max=self.options.reg_max)

    def _bins(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(1, (4, self.options.reg_max + 1))

    def _strides(self, anchors: Tensor) -> Tensor:
        """Return (P, 1): the stride of each anchor's own level, which its size tells."""
        return (anchors[:, 2:3] - anchors[:, 0:1]) / self.options.anchor_scale


@register_decoder(GFL)
def _decode(model: GFL, head_outputs: HeadOutputs) -> DensePredictions:
    """Decode with the distributions of the sides, level scales included."""
    sides = (4, model.options.reg_max + 1)
    return replace(
        decode_levels(model, head_outputs, model.decode_boxes),
        distributions=[
            permute_to_N_HWA_K(x, x.shape[1]).unflatten(2, sides) for x in head_outputs[1]
        ],
    )
