"""
ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020).

One square anchor per position, adaptive sample selection (`atss_assigner`), sigmoid focal loss,
GIoU loss weighted by each positive's quality, and a quality branch on the box tower: centerness, as
in the paper, or the IoU of the predicted box with its ground truth, as PGD (ECCV 2022) uses it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.functional.box_overlap import aligned_giou, aligned_iou
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.atss_assigner import Positives, box_centers
from kd_det.modeling.dense.inference import DEFAULT_INFERENCE, InferenceSettings
from kd_det.modeling.dense.single_anchor import SingleAnchorDetector, shared_arguments

QUALITY_BRANCHES = ("centerness", "iou")


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """
    How central each point is in its box (FCOS, Tian et al., ICCV 2019, eq. 3).

    Args:
        points: (P, 2), inside their boxes.
        boxes: (P, 4) corners.

    Returns:
        (P,) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)): 1 in the middle, 0 on the border.
    """
    low, high = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return ratio.prod(dim=1).sqrt()


@META_ARCH_REGISTRY.register()
class ATSS(SingleAnchorDetector):
    """
    ATSS, built from yaml by the keys MODEL.ATSS.

    Training gives `loss_atss_cls` (focal, over the moving average of positives), `loss_atss_loc`
    (GIoU, averaged with the quality targets as weights) and `loss_atss_quality` (binary
    cross-entropy, over the moving average of positives). A detection's score is
    sqrt(class probability * quality); the threshold is on the class probability alone, as in FCOS.

    Args:
        backbone: a Detectron2 backbone.
        head: `DenseHead` with quality and 4 box outputs, or one with the same outputs.
        head_in_features: the pyramid levels the head sees, finest first.
        num_classes: K.
        anchor_scale: side of an anchor in units of its level's stride.
        anchor_offset: centre of the first anchor in units of the stride, in [0, 1).
        assign_topk: candidates per ground-truth box and level.
        inference: how predictions become detections.
        pixel_mean: per channel, in the order of the input's channels.
        pixel_std: per channel.
        box2box_transform: from anchors and box outputs to boxes.
        quality_branch: what the quality branch predicts, "centerness" or "iou".
        focal_alpha: weight of positives in the focal loss; negatives get 1 - focal_alpha.
        focal_gamma: exponent of the focal loss.
        box_weight: factor of the GIoU loss.
        quality_weight: factor of the quality loss.

    Raises:
        ValueError: an unknown quality branch.
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
        box2box_transform: Box2BoxTransform,
        quality_branch: str = "centerness",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_weight: float = 2.0,
        quality_weight: float = 1.0,
    ) -> None:
        if quality_branch not in QUALITY_BRANCHES:
            raise ValueError(
                f"MODEL.ATSS.QUALITY_BRANCH is {quality_branch!r}, expected one of "
                f"{', '.join(QUALITY_BRANCHES)}."
            )
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
        self.box2box_transform = box2box_transform
        self.quality_branch = quality_branch
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_weight = box_weight
        self.quality_weight = quality_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.ATSS."""
        keys = cfg.MODEL.ATSS
        shared = shared_arguments(cfg, "ATSS", box_outputs=4, with_quality=True)
        return {
            **shared,
            "box2box_transform": Box2BoxTransform(weights=tuple(keys.BBOX_REG_WEIGHTS)),
            "quality_branch": keys.QUALITY_BRANCH,
            "focal_alpha": keys.FOCAL_LOSS_ALPHA,
            "focal_gamma": keys.FOCAL_LOSS_GAMMA,
            "box_weight": keys.BBOX_LOSS_WEIGHT,
            "quality_weight": keys.QUALITY_LOSS_WEIGHT,
        }

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SingleAnchorDetector.decode_boxes`; outputs are R-CNN's (dx, dy, dw, dh)."""
        return self.box2box_transform.apply_deltas(outputs, anchors)

    def scores(self, probabilities: Tensor, quality: Tensor | None) -> Tensor:
        """See `SingleAnchorDetector.scores`: sqrt(probability * quality)."""
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
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
            reduction="sum",
        )
        boxes = self.decode_boxes(box_outputs[positives.index], positives.anchors)
        target = self._quality_targets(boxes, positives)
        distance = 1 - aligned_giou(boxes, positives.boxes)
        total = mean_over_processes(target.sum()).clamp(min=1e-6)
        loss_loc = (target * distance).sum() / total
        loss_quality = F.binary_cross_entropy_with_logits(
            quality[positives.index, 0], target, reduction="sum"
        )
        return {
            "loss_atss_cls": loss_cls / normalizer,
            "loss_atss_loc": self.box_weight * loss_loc,
            "loss_atss_quality": self.quality_weight * loss_quality / normalizer,
        }

    @torch.no_grad()
    def _quality_targets(self, boxes: Tensor, positives: Positives) -> Tensor:
        if self.quality_branch == "iou":
            return aligned_iou(boxes, positives.boxes)
        return centerness(box_centers(positives.anchors), positives.boxes)
