"""
AutoAssign (Zhu et al., arXiv 2007.03496): positions weigh themselves, no threshold assigns them.

Every position inside a box, on every level, is a positive and a negative of its class at once, to
a degree that its own predictions and a learned prior around the box's centre decide
(`functional.autoassign`). Predicted are a class probability times an objectness, and the distances
to the four sides in strides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.functional.autoassign import (
    center_prior,
    center_terms,
    foreground_share,
    negative_terms,
    negative_weights,
    pairs_inside,
    positive_terms,
)
from kd_det.functional.boxes import aligned_giou, aligned_iou, box_centers, boxes_around
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.ground_truth import GroundTruth
from kd_det.modeling.dense.head import DenseHead
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector
from kd_det.modeling.dense.single_prediction_options import SinglePredictionOptions
from kd_det.modeling.registering import register_in


@dataclass(frozen=True, kw_only=True)
class AutoAssignOptions(SinglePredictionOptions):
    """
    Keys of MODEL.AUTOASSIGN (arXiv 2007.03496), beside those of `SinglePredictionOptions`.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    node = "AUTOASSIGN"

    prior_prob: float = 0.02
    # Factors of the three losses: boxes found, background, width of the centre prior.
    pos_weight: float = 0.25
    neg_weight: float = 0.75
    center_weight: float = 0.75
    # Of 1 - GIoU in the exponent of a position's confidence.
    bbox_loss_weight: float = 5.0
    # Of the confidence in a position's weight: smaller leaves a box to its best positions.
    temperature: float = 1 / 3
    # Distance in strides from a position to each side of its box that training starts with.
    box_bias: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(
                f"MODEL.AUTOASSIGN.TEMPERATURE is {self.temperature}, expected above 0."
            )


class AutoAssignHead(DenseHead):
    """
    `DenseHead` with an objectness for its quality, and the prior of each class.

    `center_mean` and `center_sigma`, (K, 2), are x and y in strides; the losses read them.

    Args:
        input_shape, num_classes, num_convs, norm, prior_prob: as `DenseHead`'s.
        box_bias: distance in strides that the fresh head predicts for every side.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        norm: str,
        prior_prob: float = 0.02,
        box_bias: float = 4.0,
    ) -> None:
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_convs=num_convs,
            norm=norm,
            prior_prob=prior_prob,
            with_quality=True,
        )
        assert self.bbox_pred.bias is not None
        nn.init.constant_(self.bbox_pred.bias, box_bias)
        self.center_mean = nn.Parameter(torch.zeros(num_classes, 2))
        self.center_sigma = nn.Parameter(torch.ones(num_classes, 2))


@register_in(META_ARCH_REGISTRY)
class AutoAssign(SinglePredictionDetector):
    """
    AutoAssign, built from yaml by the keys MODEL.AUTOASSIGN.

    Training gives `loss_autoassign_pos` (over the boxes), `loss_autoassign_neg` (over the sum of
    the prior) and `loss_autoassign_center` (mean over images); both divisors are means over
    processes, at least 1. A box that holds no position counts in the numbers of boxes alone. A
    detection's score is class probability * objectness; the threshold is on the class probability
    alone.
    """

    options: AutoAssignOptions
    options_type = AutoAssignOptions
    with_quality = True
    # See `kd_det.modeling.msad.heads`: predictions decide.
    assigns_from_anchors = False

    @classmethod
    def build_head(cls, options: Any, levels: list[ShapeSpec]) -> nn.Module:
        """See `SinglePredictionDetector.build_head`."""
        return AutoAssignHead(
            input_shape=levels,
            num_classes=options.num_classes,
            num_convs=options.num_convs,
            norm=options.norm,
            prior_prob=options.prior_prob,
            box_bias=options.box_bias,
        )

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs are l, t, r, b in strides."""
        return boxes_around(box_centers(anchors), outputs.relu() * _strides(anchors)[:, None])

    def scores(self, probabilities: Tensor, quality: Tensor | None) -> Tensor:
        """See `SinglePredictionDetector.scores`: probability * objectness."""
        assert quality is not None
        return probabilities * quality.sigmoid()

    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """See `SinglePredictionDetector.losses_of_batch`."""
        cells, truth = torch.cat(anchors), GroundTruth.of(gt_instances)
        probabilities = (outputs[0].sigmoid() * outputs[2].sigmoid()).flatten(0, 1)
        everywhere = cells.repeat(len(gt_instances), 1)
        boxes = self.decode_boxes(outputs[1].flatten(0, 1), everywhere)

        box, position = pairs_inside(box_centers(cells), truth.boxes)
        get_event_storage().put_scalar("num_pos_anchors", len(box) / len(gt_instances))
        targets, classes, image = truth.boxes[box], truth.classes[box], truth.image[box]
        row, count = image * len(cells) + position, len(truth.boxes)
        prior = self._prior(cells[position], targets, classes)
        confidence = probabilities[row, classes] * self._likelihood(boxes[row], targets)
        tau = self.options.temperature
        pos = positive_terms(confidence, prior, box, count, temperature=tau).sum()

        overlap = best_overlap(boxes.detach().view(len(gt_instances), -1, 4), gt_instances)
        share = foreground_share(overlap[row], box, count)
        weights = negative_weights(share, row, classes, probabilities)
        neg = negative_terms(probabilities * weights).sum()

        totals = torch.stack([prior.new_full((), count), prior.sum()])
        divisors = mean_over_processes(totals).clamp(min=1)
        center = center_terms(prior, image, truth.counts).mean()
        return {
            "loss_autoassign_pos": self.options.pos_weight * pos / divisors[0],
            "loss_autoassign_neg": self.options.neg_weight * neg / divisors[1],
            "loss_autoassign_center": self.options.center_weight * center,
        }

    def _prior(self, cells: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
        """Return (P,): how central cells (P, 4) are in their boxes (P, 4), as the class has it."""
        mean, sigma = self.head.center_mean[classes], self.head.center_sigma[classes]
        return center_prior(box_centers(cells), _strides(cells), targets, mean, sigma)

    def _likelihood(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Return (P,) in [0, 1]: how well predicted boxes (P, 4) fit theirs."""
        return (-self.options.bbox_loss_weight * (1 - aligned_giou(boxes, targets))).exp()


@torch.no_grad()
def best_overlap(boxes: Tensor, gt_instances: list[Instances]) -> Tensor:
    """Return (N * R,): the highest IoU of each predicted box (N, R, 4) with a box of its image."""
    targets = [instances.gt_boxes.tensor for instances in gt_instances]
    best = [
        aligned_iou(own[:, None], gt).amax(dim=1) if len(gt) else own.new_zeros(len(own))
        for own, gt in zip(boxes, targets, strict=True)
    ]
    return torch.cat(best)


def _strides(cells: Tensor) -> Tensor:
    """Return (P,): the stride of each position's own level, which the side of its cell tells."""
    return cells[:, 2] - cells[:, 0]
