"""
FSAF (Zhu, He, Savvides, CVPR 2019): each object chooses the pyramid level that learns it best.

The anchor-free branch alone, on RetinaNet's head with one prediction per position. On every level
the middle of a box is positive and a margin around it is ignored; of these levels the one with the
smallest loss stays (`functional.fsaf`). Predicted are class probabilities and the distances to the
four sides in multiples of 4 strides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from kd_det.functional.boxes import aligned_iou, box_centers, boxes_around
from kd_det.functional.fsaf import Pairs, find_pairs, ignore, label_pairs, select_levels
from kd_det.functional.level_grid import to_device
from kd_det.functional.reduce import mean_over_processes
from kd_det.modeling.dense.ground_truth import GroundTruth
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector
from kd_det.modeling.dense.single_prediction_options import SinglePredictionOptions
from kd_det.modeling.norms import head_norm
from kd_det.modeling.registering import register_in

# In the loss a side is at least this far away, in the head's units: no box without area.
_SMALLEST_DISTANCE = 1e-4
_SMALLEST_IOU = 1e-6


@dataclass(frozen=True, kw_only=True)
class FsafOptions(SinglePredictionOptions):
    """
    Keys of MODEL.FSAF (CVPR 2019), beside those of `SinglePredictionOptions`.

    Raises:
        ValueError: regions, a cover or a scale out of range.
    """

    node = "FSAF"

    norm: str = ""
    nms_thresh_test: float = 0.5
    # Positive is where a box shrunk to CORE of its sides lies, ignored where it does shrunk to
    # IGNORE. MMDetection's; the paper's IGNORE is 0.5.
    core: float = 0.2
    ignore: float = 0.2
    # Fraction of a position's cell that a shrunk box must cover more than.
    min_cover: float = 0.01
    # A position whose class another box wants ignored stays positive (paper), or not (MMDetection).
    foreground_dominates: bool = False
    # Distances to the sides are predicted in multiples of this many strides.
    box_scale: float = 4.0
    # Distance in that unit that training starts with; the paper's is 0.1.
    box_bias: float = 0.25
    # Factor of the IoU loss.
    bbox_loss_weight: float = 1.0
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    focal_loss_alpha: float = 0.25
    focal_loss_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.core <= self.ignore <= 1:
            raise ValueError(
                f"MODEL.FSAF.CORE and IGNORE are {self.core} and {self.ignore}, expected fractions "
                "of a box's sides with 0 < CORE <= IGNORE <= 1."
            )
        if not 0 <= self.min_cover < 1:
            raise ValueError(f"MODEL.FSAF.MIN_COVER is {self.min_cover}, expected in [0, 1).")
        if self.box_scale <= 0:
            raise ValueError(f"MODEL.FSAF.BOX_SCALE is {self.box_scale}, expected above 0.")


@register_in(META_ARCH_REGISTRY)
class FSAF(SinglePredictionDetector):
    """
    FSAF's anchor-free branch, built from yaml by the keys MODEL.FSAF.

    Training gives `loss_fsaf_cls` (focal) and `loss_fsaf_loc` (-log IoU), both over the mean number
    of positives per process, or, where no process has any, of all positions. A detection's score is
    its class probability.
    """

    options: FsafOptions
    options_type = FsafOptions
    with_quality = False
    # See `kd_det.modeling.msad.heads`: losses choose the levels.
    assigns_from_anchors = False

    @classmethod
    def build_head(cls, options: Any, levels: list[ShapeSpec]) -> nn.Module:
        """See `SinglePredictionDetector.build_head`."""
        head = RetinaNetHead(
            input_shape=levels,
            num_classes=options.num_classes,
            num_anchors=1,
            conv_dims=[levels[0].channels] * options.num_convs,
            norm=head_norm(options.norm),
            prior_prob=options.prior_prob,
        )
        nn.init.constant_(head.bbox_pred.bias, options.box_bias)
        return head

    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """See `SinglePredictionDetector.decode_boxes`; outputs are top, bottom, left, right."""
        return self._decode(outputs.relu(), anchors)

    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """See `SinglePredictionDetector.losses_of_batch`."""
        cells, truth = torch.cat(anchors), GroundTruth.of(gt_instances)
        logits, box_outputs = (x.flatten(0, 1) for x in outputs)
        pairs = self._pairs(cells, truth)
        row, classes = (
            truth.image[pairs.box] * len(cells) + pairs.position,
            truth.classes[pairs.box],
        )
        labels = label_pairs(
            pairs,
            row,
            truth.boxes,
            classes,
            logits,
            foreground_dominates=self.options.foreground_dominates,
        )
        focal = self._focal_losses(logits, row, classes, labels.positive)
        distances = box_outputs[row].clamp(min=_SMALLEST_DISTANCE)
        boxes = self._decode(distances, cells[pairs.position])
        loc = -aligned_iou(boxes, truth.boxes[pairs.box]).clamp(min=_SMALLEST_IOU).log()

        loss = loc.detach() + (labels.weights[row] * focal.detach()[row]).sum(dim=1)
        level = _level_numbers(anchors)[pairs.position]
        shape = (len(truth.boxes), len(anchors))
        kept = select_levels(loss, labels.positive, pairs.box, level, shape)
        weights = ignore(labels.weights, row, classes, labels.positive & ~kept)
        divisor = self._divisor(kept.sum(), len(logits))
        get_event_storage().put_scalar("num_pairs", len(row) / len(gt_instances))
        return {
            "loss_fsaf_cls": (weights * focal).sum() / divisor,
            "loss_fsaf_loc": self.options.bbox_loss_weight * loc.where(kept, 0).sum() / divisor,
        }

    def _pairs(self, cells: Tensor, truth: GroundTruth) -> Pairs:
        options = self.options
        return find_pairs(
            box_centers(cells),
            cells[:, 2] - cells[:, 0],
            truth.boxes,
            core=options.core,
            ignore=options.ignore,
            min_cover=options.min_cover,
        )

    def _focal_losses(
        self, logits: Tensor, row: Tensor, classes: Tensor, positive: Tensor
    ) -> Tensor:
        """Return (N * R, K), every class at every position, before any of them is ignored."""
        targets = torch.zeros_like(logits)
        index = row * logits.shape[1] + classes
        targets.view(-1).scatter_reduce_(0, index, positive.to(targets.dtype), "amax")
        losses: Tensor = sigmoid_focal_loss(
            logits,
            targets,
            alpha=self.options.focal_loss_alpha,
            gamma=self.options.focal_loss_gamma,
        )
        return losses

    def _decode(self, distances: Tensor, anchors: Tensor) -> Tensor:
        """Decode (P, 4) distances that are not negative: top, bottom, left, right."""
        unit = self.options.box_scale * (anchors[:, 2:3] - anchors[:, 0:1])
        return boxes_around(box_centers(anchors), distances[:, [2, 0, 3, 1]] * unit)

    def _divisor(self, positives: Tensor, positions: int) -> Tensor:
        """Return the mean number of positives over processes; of positions where that is 0."""
        numbers = torch.stack([positives.float(), positives.new_full((), positions).float()])
        mean = mean_over_processes(numbers)
        # Not at least 1: with one positive in two processes, their mean is a half.
        return mean[0].where(mean[0] > 0, mean[1])


def _level_numbers(anchors: list[Tensor]) -> Tensor:
    """Return (R,) int64: the level of each position."""
    sizes = torch.tensor([len(level) for level in anchors])
    return to_device(torch.arange(len(anchors)).repeat_interleave(sizes), anchors[0].device)
