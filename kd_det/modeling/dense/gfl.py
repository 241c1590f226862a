"""
GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020): one score for class and quality at once.

The class score is trained towards the IoU of the predicted box (quality focal loss); each side of
a box is a distribution over distances 0 .. reg_max strides from the anchor's centre (distribution
focal loss), and the box is read off as its mean. Assignment is that of ATSS.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from kd_det.functional.box_overlap import aligned_giou, aligned_iou
from kd_det.functional.focal import (
    distribution_focal_loss,
    distribution_mean,
    quality_focal_loss,
)
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.atss_assigner import Positives, box_centers
from kd_det.modeling.dense.inference import DEFAULT_INFERENCE, InferenceSettings
from kd_det.modeling.dense.single_anchor import SingleAnchorDetector, shared_arguments


@META_ARCH_REGISTRY.register()
class GFL(SingleAnchorDetector):
    """
    GFL, built from yaml by the keys MODEL.GFL.

    Training gives `loss_gfl_cls` (quality focal loss over the moving average of positives), and
    `loss_gfl_loc` (GIoU) and `loss_gfl_dfl` (mean over the 4 sides), both weighted by the
    positive's own highest class score, detached, and divided by the batch's sum of these weights,
    at least 1.
    A detection's score is its class score.

    Args:
        backbone: a Detectron2 backbone.
        head: `DenseHead` with 4 * (reg_max + 1) box outputs, or one with the same outputs: the bins
            of left, top, right, bottom.
        head_in_features: the pyramid levels the head sees, finest first.
        num_classes: K.
        anchor_scale: side of an anchor in units of its level's stride; matters to assignment alone.
        anchor_offset: centre of the first anchor in units of the stride, in [0, 1).
        assign_topk: candidates per ground-truth box and level.
        inference: how predictions become detections.
        pixel_mean: per channel, in the order of the input's channels.
        pixel_std: per channel.
        reg_max: largest distance, in strides.
        beta: exponent of the quality focal loss.
        box_weight: factor of the GIoU loss.
        dfl_weight: factor of the distribution focal loss.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        num_classes: int,
        anchor_scale: float = 8.0,
        anchor_offset: float = 0.0,
        assign_topk: int = 9,
        inference: InferenceSettings = DEFAULT_INFERENCE,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        reg_max: int = 16,
        beta: float = 2.0,
        box_weight: float = 2.0,
        dfl_weight: float = 0.25,
    ) -> None:
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=head_in_features,
            num_classes=num_classes,
            anchor_scale=anchor_scale,
            anchor_offset=anchor_offset,
            assign_topk=assign_topk,
            inference=inference,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.reg_max = reg_max
        self.beta = beta
        self.box_weight = box_weight
        self.dfl_weight = dfl_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.GFL."""
        keys = cfg.MODEL.GFL
        outputs = 4 * (keys.REG_MAX + 1)
        shared = shared_arguments(cfg, "GFL", box_outputs=outputs, with_quality=False)
        return {
            **shared,
            "reg_max": keys.REG_MAX,
            "beta": keys.QUALITY_FOCAL_BETA,
            "box_weight": keys.BBOX_LOSS_WEIGHT,
            "dfl_weight": keys.DFL_LOSS_WEIGHT,
        }

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SingleAnchorDetector.decode_boxes`; outputs are the logits of the sides' bins."""
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
        loss_cls = quality_focal_loss(logits, targets, self.beta).sum()

        weight = logits.detach()[positives.index].amax(dim=1).sigmoid()
        total = mean_over_processes(weight.sum()).clamp(min=1)
        loss_loc = (weight * (1 - aligned_giou(boxes, positives.boxes))).sum() / total
        sides = distribution_focal_loss(self._bins(outputs), self._distances(positives))
        loss_dfl = (weight * sides.mean(dim=1)).sum() / total
        return {
            "loss_gfl_cls": loss_cls / normalizer,
            "loss_gfl_loc": self.box_weight * loss_loc,
            "loss_gfl_dfl": self.dfl_weight * loss_dfl,
        }

    def _distances(self, positives: Positives) -> Tensor:
        """Return (P, 4) distances of the sides from the anchors' centres, in strides."""
        centers = box_centers(positives.anchors)
        low, high = centers - positives.boxes[:, :2], positives.boxes[:, 2:] - centers
        distances = torch.cat([low, high], dim=1) / self._strides(positives.anchors)
        return distances.clamp(min=0, max=self.reg_max)

    def _bins(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(1, (4, self.reg_max + 1))

    def _strides(self, anchors: Tensor) -> Tensor:
        """Return (P, 1): the stride of each anchor's own level, which its size tells."""
        return (anchors[:, 2:3] - anchors[:, 0:1]) / self.anchor_scale
