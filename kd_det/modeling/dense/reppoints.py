"""
RepPoints (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019, arXiv
1904.11490).

Each position predicts a set of points, then reads the maps at them to classify and to move them; a
box is read off either set (`functional.reppoints`). The first points are trained at the position
nearest to each object, classes and refined points where the first points' box overlaps it.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.functional.boxes import box_centers
from kd_det.functional.reppoints import (
    IGNORED,
    Transform,
    assign_by_overlap,
    assign_nearest,
    points_to_boxes,
    scaled_gradient,
)
from kd_det.modeling.dense.matching import class_targets, join_images, loss_divisors
from kd_det.modeling.dense.reppoints_head import RepPointsHead
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector
from kd_det.modeling.dense.single_prediction_options import SinglePredictionOptions
from kd_det.modeling.registering import register_in


@dataclass(frozen=True, kw_only=True)
class RepPointsOptions(SinglePredictionOptions):
    """
    Keys of MODEL.REPPOINTS (ICCV 2019), beside those of `SinglePredictionOptions`.

    Raises:
        ValueError: points that fill no kernel, an unknown transform, or thresholds that are no
            range.
    """

    node = "REPPOINTS"

    num_convs: int = 3
    nms_thresh_test: float = 0.5
    # Points of a position: the square of an odd number, one for each tap of the deformable kernels.
    num_points: int = 9
    # From points to box: "moment" (mean and deviation of the points), "minmax" (the smallest box
    # around them) or "partial_minmax" (around the first four).
    transform: str = "moment"
    # Factor of the gradient of the learned half width and height in deviations, for "moment".
    moment_mul: float = 0.01
    # Factor of the gradient that reaches the first points by what is read at them.
    gradient_mul: float = 0.1
    # Strides of a level that are the unit of its box losses, and the side of the objects that
    # belong to it.
    point_scale: float = 4.0
    # IoU of a first box with an object below which it is background, and from which it is positive.
    iou_thresholds: list[float] = field(default_factory=lambda: [0.4, 0.5])
    # Where the smooth L1 losses of the boxes turn linear.
    smooth_l1_beta: float = 0.11
    # Factors of the box losses of the first and of the refined points.
    init_loss_weight: float = 0.5
    refine_loss_weight: float = 1.0
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    focal_loss_alpha: float = 0.25
    focal_loss_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_points not in (9, 25, 49):
            raise ValueError(
                f"MODEL.REPPOINTS.NUM_POINTS is {self.num_points}, expected 9, 25 or 49: a point "
                "for each tap of a square kernel."
            )
        if self.transform not in get_args(Transform):
            raise ValueError(
                f"MODEL.REPPOINTS.TRANSFORM is {self.transform!r}, expected one of "
                f"{', '.join(get_args(Transform))}."
            )
        if len(self.iou_thresholds) != 2 or not (
            0 <= self.iou_thresholds[0] <= self.iou_thresholds[1] <= 1
        ):
            raise ValueError(
                f"MODEL.REPPOINTS.IOU_THRESHOLDS is {self.iou_thresholds}, expected two numbers "
                "from 0 to 1, the smaller first."
            )

    def box_outputs(self) -> int:
        """Return the coordinates of all points together."""
        return 2 * self.num_points


@register_in(META_ARCH_REGISTRY)
class RepPoints(SinglePredictionDetector):
    """
    RepPoints, from yaml by the keys MODEL.REPPOINTS; its arguments: `SinglePredictionDetector`.

    Training gives `loss_reppoints_cls` (focal), `loss_reppoints_init` and `loss_reppoints_refine`
    (smooth L1 of the boxes of either points), each over the positives of its assignment. A
    detection's score is its class probability.
    """

    options: RepPointsOptions
    options_type = RepPointsOptions
    with_quality = False

    @classmethod
    def build_head(cls, options: RepPointsOptions, levels: list[ShapeSpec]) -> nn.Module:
        """See `SinglePredictionDetector.build_head`."""
        return RepPointsHead(
            input_shape=levels,
            num_classes=options.num_classes,
            num_convs=options.num_convs,
            norm=options.norm,
            prior_prob=options.prior_prob,
            num_points=options.num_points,
            gradient_mul=options.gradient_mul,
            with_spread=options.transform == "moment",
        )

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs are points in cells, (y, x)."""
        spread = self.head.spread
        if spread is not None:
            spread = scaled_gradient(spread, self.options.moment_mul)
        transform: Any = self.options.transform
        cells = points_to_boxes(outputs, transform, spread)
        return cells * _strides(anchors) + box_centers(anchors).repeat(1, 2)

    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """See `SinglePredictionDetector.losses_of_batch`."""
        logits, refined, initial = outputs
        every = torch.cat(anchors)
        matched = self.assign(initial, every, gt_instances)
        divisors = loss_divisors(matched)
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])
        gt_classes = torch.cat([x.gt_classes for x in gt_instances])
        focal = sigmoid_focal_loss(
            logits,
            class_targets(matched[1], gt_classes, logits),
            alpha=self.options.focal_loss_alpha,
            gamma=self.options.focal_loss_gamma,
        ).sum(dim=2)
        # The one place that waits for the device, for both stages: their positives decide shapes.
        stage, image, position = (matched >= 0).nonzero().T
        get_event_storage().put_scalar("num_pos_points", len(stage) / len(gt_instances))
        points = torch.stack([initial, refined])[stage, image, position]
        boxes = self.decode_boxes(points, every[position])
        unit = self.options.point_scale * _strides(every[position])
        distance = F.smooth_l1_loss(
            boxes / unit,
            gt_boxes[matched[stage, image, position]] / unit,
            reduction="none",
            beta=self.options.smooth_l1_beta,
        ).sum(dim=1)
        first, second = ((distance * (stage == i)).sum() / divisors[i] for i in (0, 1))
        return {
            "loss_reppoints_cls": (focal * (matched[1] != IGNORED)).sum() / divisors[1],
            "loss_reppoints_init": self.options.init_loss_weight * first,
            "loss_reppoints_refine": self.options.refine_loss_weight * second,
        }

    @torch.no_grad()
    def assign(self, initial: Tensor, anchors: Tensor, gt_instances: list[Instances]) -> Tensor:
        """
        Assign the positions of a batch to its objects, for both sets of points.

        Args:
            initial: (N, R, 2 n) the first points, in cells.
            anchors: (R, 4) corners in pixels, of a side of one stride.
            gt_instances: N, with `gt_boxes` and `gt_classes`.

        Returns:
            (2, N, R) int64, for the first points, and for the refined ones and classes: index into
            the objects of all images one after the other, -1 for background, `IGNORED`.
        """
        boxes = self.decode_boxes(initial.flatten(0, 1), anchors.repeat(len(initial), 1))
        positions, strides = box_centers(anchors), _strides(anchors)[:, 0]
        low, high = self.options.iou_thresholds
        matches = []
        for own, instances in zip(boxes.unflatten(0, initial.shape[:2]), gt_instances, strict=True):
            objects = instances.gt_boxes.tensor
            nearest = assign_nearest(positions, strides, objects, self.options.point_scale)
            matches.append(torch.stack([nearest, assign_by_overlap(own, objects, low, high)]))
        return join_images(matches, [len(x) for x in gt_instances])


def _strides(anchors: Tensor) -> Tensor:
    """Return (P, 1): the stride of each anchor's level, which is its side."""
    return anchors[:, 2:3] - anchors[:, 0:1]
