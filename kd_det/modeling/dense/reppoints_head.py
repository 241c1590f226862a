"""The head of RepPoints (ICCV 2019): points of each position, found in two steps."""

import math
from typing import ClassVar

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32
from kd_det.functional.reppoints import scaled_gradient
from kd_det.modeling.deform_conv import DeformConv
from kd_det.modeling.dense.head import prediction_conv
from kd_det.modeling.norms import head_norm


class RepPointsHead(RetinaNetHead):
    """
    RetinaNet's towers; first points from the box tower; classes and refined points from what the
    towers say there.

    Module names are those of Detectron2's RetinaNetHead (`cls_subnet`, `bbox_subnet`, `cls_score`,
    `bbox_pred` for the refined points); `initial_conv` and `initial_pred` give the first points,
    `cls_deform` and `refine_deform` read the towers at them. `spread`, where there is one, are the
    logarithms of half width and half height in standard deviations of the points.

    Args:
        input_shape: the pyramid levels; all of the same width.
        num_classes: K.
        num_convs: convolutions per tower.
        norm: Detectron2 norm name of the towers.
        prior_prob: class probability the fresh head predicts everywhere.
        num_points: n, the square of an odd number.
        gradient_mul: factor of the gradient that reaches the first points by what is read there.
        with_spread: whether there is a `spread`.
    """

    # The maps are read at the points, so no tower can be replaced by another model's.
    predicts_from_towers: ClassVar[bool] = False

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        norm: str,
        prior_prob: float = 0.01,
        num_points: int = 9,
        gradient_mul: float = 0.1,
        with_spread: bool = True,
    ) -> None:
        channels = input_shape[0].channels
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=1,
            conv_dims=[channels] * num_convs,
            norm=head_norm(norm),
            prior_prob=prior_prob,
        )
        side = round(num_points**0.5)
        self.cls_score = prediction_conv(
            channels, num_classes, kernel_size=1, bias=-math.log((1 - prior_prob) / prior_prob)
        )
        self.bbox_pred = prediction_conv(channels, 2 * num_points, kernel_size=1)
        self.initial_conv = prediction_conv(channels, channels)
        self.initial_pred = prediction_conv(channels, 2 * num_points, kernel_size=1)
        self.cls_deform = DeformConv(channels, side)
        self.refine_deform = DeformConv(channels, side)
        self.spread = nn.Parameter(torch.zeros(2)) if with_spread else None
        self.gradient_mul = gradient_mul
        taps = torch.arange(side, dtype=torch.float32) - side // 2
        grid = torch.cartesian_prod(taps, taps).flatten()  # y and x of each tap, row by row
        self.register_buffer("taps", grid.view(1, -1, 1, 1), persistent=False)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """
        Predict classes and points.

        Args:
            features: per level, (N, C, H, W).

        Returns:
            Per level: class logits (N, K, H, W), the refined points (N, 2 n, H, W) and the first
            ones, y and x of each alternating, in cells from the position; float32 at least.
        """
        logits, refined, initial = [], [], []
        for feature in features:
            point_feature = self.bbox_subnet(feature)
            first = _points(self.initial_pred, self.initial_conv(point_feature))
            # Minus the kernel's own grid: tap k reads the map exactly at point k.
            offset = scaled_gradient(first, self.gradient_mul) - self.taps
            cls_feature = self.cls_deform(self.cls_subnet(feature), offset)
            logits.append(self.cls_score(F.relu(cls_feature)))
            moved = _points(self.bbox_pred, self.refine_deform(point_feature, offset))
            refined.append(moved + first.detach())
            initial.append(first)
        return logits, refined, initial


def _points(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return points in float32 at least; in bfloat16 they would lie on a coarse grid."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = conv(at_least_float32(F.relu(x)))
    return out
