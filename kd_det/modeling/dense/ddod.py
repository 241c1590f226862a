"""
DDOD (Chen et al., "Disentangle Your Dense Object Detector", ACM MM 2021, arXiv 2107.02963).

ATSS's head with a deformable first convolution in each tower, and two assignments by what the
detector predicts (`functional.ddod`), one for the classes and one for boxes and their IoU. Levels
that have had few positives count for more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, get_args

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.functional.boxes import aligned_giou, aligned_iou
from kd_det.functional.ddod import (
    Assigner,
    assign_by_quality,
    level_factors,
    prediction_qualities,
)
from kd_det.functional.reduce import sum_over_processes
from kd_det.modeling.deform_conv import SelfDeformConv
from kd_det.modeling.dense.guided import GuidedAssignment
from kd_det.modeling.dense.head import DenseHead
from kd_det.modeling.dense.matching import class_targets, join_images, loss_divisors
from kd_det.modeling.dense.single_anchor_options import SingleAnchorOptions
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector
from kd_det.modeling.registering import register_in


@dataclass(frozen=True, kw_only=True)
class DdodOptions(SingleAnchorOptions):
    """
    Keys of MODEL.DDOD (ACM MM 2021), beside those of `SingleAnchorOptions`.

    Raises:
        ValueError: an unknown assigner, or an exponent outside [0, 1].
    """

    node = "DDOD"

    # Candidates of an object: "atss", the TOPK nearest positions of each level, of which those
    # above their mean quality plus deviation are positive (the paper), or "topk", the TOPK of
    # highest quality of all levels (PGD, ECCV 2022).
    assigner: str = "atss"
    # Exponent of the predicted box's IoU in the quality, 1 - it being the class probability's, for
    # either assignment. PGD's DDOD has 0.6 for boxes.
    cls_iou_exponent: float = 0.8
    reg_iou_exponent: float = 0.5
    # Levels weigh from 1 (most positives so far) to 2 (fewest).
    level_reweight: bool = True
    # Factor of the loss of the predicted IoU (binary cross-entropy).
    quality_loss_weight: float = 1.0
    # Multiples of (dx, dy, dw, dh) that the box branch predicts.
    bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    focal_loss_alpha: float = 0.25
    focal_loss_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assigner not in get_args(Assigner):
            raise ValueError(
                f"MODEL.DDOD.ASSIGNER is {self.assigner!r}, expected one of "
                f"{', '.join(get_args(Assigner))}."
            )
        for name in ("cls_iou_exponent", "reg_iou_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"MODEL.DDOD.{name.upper()} is {getattr(self, name)}, expected a number from 0 "
                    "to 1."
                )


class DdodHead(DenseHead):
    """`DenseHead` whose towers begin with a deformable convolution each."""

    def __init__(self, *, input_shape: list[ShapeSpec], **kwargs: Any) -> None:
        super().__init__(input_shape=input_shape, **kwargs)
        for tower in (self.cls_subnet, self.bbox_subnet):
            tower[0] = SelfDeformConv(input_shape[0].channels)


@register_in(META_ARCH_REGISTRY)
class DDOD(GuidedAssignment, SinglePredictionDetector):
    """
    DDOD, built from yaml by the keys MODEL.DDOD; its arguments: `SinglePredictionDetector`.

    Training gives `loss_ddod_cls` (focal, over the positives of the assignment for classes),
    `loss_ddod_loc` (GIoU) and `loss_ddod_quality` (binary cross-entropy with the IoU), both over
    the positives of the assignment for boxes. A detection's score is class probability * quality;
    the threshold is on the class probability alone.

    Attributes:
        level_counts: (2, L) int64, positives so far of either assignment on each level, of all
            processes.
    """

    options: DdodOptions
    options_type = DdodOptions
    with_quality = True
    # What a resumed run goes on with, although it is no part of the model that ships.
    running_buffers: ClassVar[tuple[str, ...]] = ("level_counts",)
    level_counts: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        counts = torch.zeros(2, len(self.options.in_features), dtype=torch.int64)
        self.register_buffer("level_counts", counts, persistent=False)

    @classmethod
    def build_head(cls, options: DdodOptions, levels: list[ShapeSpec]) -> nn.Module:
        """See `SinglePredictionDetector.build_head`."""
        return DdodHead(
            input_shape=levels,
            num_classes=options.num_classes,
            num_convs=options.num_convs,
            norm=options.norm,
            prior_prob=options.prior_prob,
            with_quality=cls.with_quality,
        )

    @cached_property
    def box2box_transform(self) -> Box2BoxTransform:
        """From anchors and box outputs to boxes."""
        return Box2BoxTransform(weights=tuple(self.options.bbox_reg_weights))

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs are (dx, dy, dw, dh)."""
        return self.box2box_transform.apply_deltas(outputs, anchors)

    def scores(self, probabilities: Tensor, quality: Tensor | None) -> Tensor:
        """See `SinglePredictionDetector.scores`: probability * quality."""
        assert quality is not None
        return probabilities * quality.sigmoid()

    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """See `SinglePredictionDetector.losses_of_batch`."""
        logits, deltas, quality = outputs
        matched = self.assign(logits, deltas, anchors, gt_instances)
        divisors = loss_divisors(matched)
        factors = self._factors(matched, [len(level) for level in anchors])
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])
        gt_classes = torch.cat([x.gt_classes for x in gt_instances])

        focal = sigmoid_focal_loss(
            logits,
            class_targets(matched[0], gt_classes, logits),
            alpha=self.options.focal_loss_alpha,
            gamma=self.options.focal_loss_gamma,
        ).sum(dim=2)

        # The one place that waits for the device: the number of positives decides the shapes.
        image, position = (matched[1] >= 0).nonzero().T
        get_event_storage().put_scalar("num_pos_anchors", len(image) / len(gt_instances))
        boxes = self.decode_boxes(deltas[image, position], torch.cat(anchors)[position])
        target = gt_boxes[matched[1, image, position]]
        weight = factors[1, position]
        distance = weight * (1 - aligned_giou(boxes, target))
        loss_quality = F.binary_cross_entropy_with_logits(
            quality[image, position, 0],
            aligned_iou(boxes.detach(), target),
            weight=weight,
            reduction="sum",
        )
        return {
            "loss_ddod_cls": (factors[0] * focal).sum() / divisors[0],
            "loss_ddod_loc": self.options.bbox_loss_weight * distance.sum() / divisors[1],
            "loss_ddod_quality": self.options.quality_loss_weight * loss_quality / divisors[1],
        }

    @torch.no_grad()
    def assign(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: list[Tensor],
        gt_instances: list[Instances],
    ) -> Tensor:
        """
        Assign the positions of a batch to its objects, by predictions.

        Args:
            logits: (N, R, K).
            deltas: (N, R, 4) box outputs.
            anchors: per level, (R_l, 4) corners in pixels.
            gt_instances: N, with `gt_boxes` and `gt_classes`.

        Returns:
            (2, N, R) int64, for classes and for boxes: index into the objects of all images one
            after the other, -1 for background.
        """
        boxes = self.decode_boxes(deltas.flatten(0, 1), torch.cat(anchors).repeat(len(deltas), 1))
        logits, boxes = self.predictions_to_assign_by(
            logits, boxes.view_as(deltas), [len(level) for level in anchors]
        )
        exponents = self.options.cls_iou_exponent, self.options.reg_iou_exponent
        matches = []
        for image, instances in enumerate(gt_instances):
            objects = instances.gt_boxes.tensor
            qualities = prediction_qualities(
                logits[image], boxes[image], objects, instances.gt_classes, exponents
            )
            found = [self._match(anchors, objects, quality) for quality in qualities]
            matches.append(torch.stack(found))
        return join_images(matches, [len(x) for x in gt_instances])

    def _match(self, anchors: list[Tensor], objects: Tensor, quality: Tensor) -> Tensor:
        assigner: Any = self.options.assigner
        return assign_by_quality(
            anchors, objects, quality, assigner=assigner, topk=self.options.topk
        )

    def _factors(self, matched: Tensor, sizes: list[int]) -> Tensor:
        """
        Return (2, R), the weight of each position's level; count this batch's positives.

        A pass without gradients is for other statistics (PreciseBN): it counts nothing.
        """
        if not self.options.level_reweight:
            return torch.ones_like(matched[:, 0], dtype=torch.float32)
        levels = (matched >= 0).sum(dim=1).split(sizes, dim=1)
        counts = torch.stack([level.sum(dim=1) for level in levels], dim=1)
        if torch.is_grad_enabled():
            self.level_counts += sum_over_processes(counts).to(torch.int64)
        factors = level_factors(self.level_counts).split(1, dim=1)
        return torch.cat([x.expand(-1, n) for x, n in zip(factors, sizes, strict=True)], dim=1)
