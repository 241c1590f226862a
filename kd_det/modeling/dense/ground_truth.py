"""The ground truth of a batch in flat tensors, for assignments that treat all its boxes at once."""

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from kd_det.functional.level_grid import to_device


class GroundTruth(NamedTuple):
    """
    The G boxes of a batch of N images, image by image.

    Args:
        boxes: (G, 4) corners in pixels.
        classes: (G,) int64.
        image: (G,) int64 in [0, N), the image of each box.
        counts: (N,) int64, boxes of each image.
    """

    boxes: Tensor
    classes: Tensor
    image: Tensor
    counts: Tensor

    @classmethod
    def of(cls, gt_instances: list[Instances]) -> "GroundTruth":
        """Collect `gt_boxes` and `gt_classes` of all images."""
        boxes = torch.cat([instances.gt_boxes.tensor for instances in gt_instances])
        classes = torch.cat([instances.gt_classes for instances in gt_instances])
        # Made on the CPU, which knows the numbers: a device would have to be asked for them.
        counts = torch.tensor([len(instances) for instances in gt_instances])
        image = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(boxes, classes, to_device(image, boxes.device), to_device(counts, boxes.device))
