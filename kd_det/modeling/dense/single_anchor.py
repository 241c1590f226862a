"""What ATSS and GFL share: the assignment of ATSS, and what their losses are divided by."""

import abc
from typing import ClassVar

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from kd_det.functional.reduce import mean_number_over_processes
from kd_det.modeling.dense.atss_assigner import Positives, find_positives
from kd_det.modeling.dense.single_anchor_options import SingleAnchorOptions
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector

# The loss normaliser of Detectron2's detectors starts here and follows the number of positives.
_INITIAL_POSITIVES = 100


class SingleAnchorDetector(SinglePredictionDetector):
    """
    A dense detector with one square anchor per position and the assignment of ATSS.

    Its arguments are those of `SinglePredictionDetector`.
    """

    options: SingleAnchorOptions
    # See `kd_det.modeling.msad.heads`.
    assigns_from_anchors: ClassVar[bool] = True

    @abc.abstractmethod
    def losses(
        self, flat: list[Tensor], positives: Positives, normalizer: float
    ) -> dict[str, Tensor]:
        """
        Compute the named losses.

        Args:
            flat: the head's outputs, each (N * R, D), at least float32.
            positives: the anchors that have a box.
            normalizer: moving average of the positives per batch and process, at least about 1.

        Returns:
            Scalars by name, attached to every output of the head even without positives.
        """

    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """See `SinglePredictionDetector.losses_of_batch`."""
        positives = self.label_anchors([Boxes(level) for level in anchors], gt_instances)
        count = len(positives.index)
        get_event_storage().put_scalar("num_pos_anchors", count / len(gt_instances))
        mean = mean_number_over_processes(count, self.device)
        normalizer = self._ema_update("loss_normalizer", max(mean, 1), _INITIAL_POSITIVES)
        return self.losses([x.flatten(0, 1) for x in outputs], positives, normalizer)

    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Positives:
        """
        Assign the anchors of a batch to its ground truth.

        Args:
            anchors: per level, R_l boxes, the same for all images.
            gt_instances: one per image, with `gt_boxes` and `gt_classes`.

        Returns:
            The positives of all images.
        """
        return find_positives(
            [level.tensor for level in anchors],
            [instances.gt_boxes.tensor for instances in gt_instances],
            [instances.gt_classes for instances in gt_instances],
            topk=self.options.topk,
        )

    def class_targets(self, logits: Tensor, positives: Positives, values: Tensor) -> Tensor:
        """Return (N * R, K): `values` (P,) at each positive's own class, 0 elsewhere."""
        targets = torch.zeros_like(logits)
        targets[positives.index, positives.classes] = values
        return targets
