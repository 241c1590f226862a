"""What all distillers read of a batch: its ground truth and its geometry, once per step."""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.distillation.pairing import LevelPair, common_size, on_one_grid
from kd_det.distillers import DensePredictions, Pair, PredictionPair, Targets
from kd_det.functional.level_grid import Grid


@dataclass
class Frame:
    """
    The geometry of one batch, computed once for all distillers.

    Attributes:
        image_sizes: per image (height, width) as loaded, without padding.
        on_device: the same, (N, 2) float on the models' device.
        masks: `Pair.valid` of the grids seen so far.
        loss_normalizer: what the student divides its own losses by; None where it has no such
            number.
    """

    image_sizes: list[tuple[int, int]]
    on_device: Tensor
    masks: dict[Grid, Tensor]
    loss_normalizer: float | None = None

    @classmethod
    def of(
        cls,
        image_sizes: list[tuple[int, int]],
        device: torch.device,
        student: nn.Module | None = None,
    ) -> "Frame":
        """Return the frame of a batch that the student has seen."""
        sizes = torch.tensor(image_sizes, dtype=torch.float32)
        # Detectron2's dense detectors have it once they have trained a step; its keypoint head
        # has a word of that name.
        found = getattr(student, "loss_normalizer", None)
        normalizer = float(found) if isinstance(found, numbers.Real) else None
        return cls(image_sizes, sizes.to(device, non_blocking=True), {}, normalizer)

    def predictions(
        self, pair: LevelPair, student: DensePredictions, teacher: DensePredictions
    ) -> PredictionPair:
        """Cut a level's predictions of both models to their common positions."""
        sizes = student.sizes[pair.student], teacher.sizes[pair.teacher]
        size = common_size(*sizes, pair, self.image_sizes)
        return PredictionPair(
            name=pair.name,
            grid=Grid(*size, pair.stride, student.offset),
            student=student.level(pair.student, size),
            teacher=teacher.level(pair.teacher, size),
            anchors=None if student.anchors is None else student.anchors[pair.student],
            image_sizes=self.on_device,
            masks=self.masks,
        )

    def pair(self, pair: LevelPair, student: Tensor, teacher: Tensor, adapter: nn.Module) -> Pair:
        """Bring two captured maps onto one grid, the student's through its adapter."""
        student, teacher = on_one_grid(student, teacher, pair, self.image_sizes)
        return Pair(pair.name, pair.stride, adapter(student), teacher, self.on_device, self.masks)


def targets_of(batched_inputs: list[dict[str, Any]], *, boxes: bool = True) -> Targets:
    """
    Collect the ground truth of a batch in the loaded image's frame, on the CPU.

    Args:
        batched_inputs: Detectron2's inputs.
        boxes: boxes and classes are needed; without, data that has none will do.

    Raises:
        ValueError: they are needed, and there are none.
    """
    image_sizes = [(item["image"].shape[-2], item["image"].shape[-1]) for item in batched_inputs]
    if any("instances" not in item for item in batched_inputs):
        if boxes:
            raise ValueError(
                "An active distiller needs boxes, but the training data has none ('instances'); "
                "take this distiller out of KD.DISTILLERS, or train on data with boxes."
            )
        return Targets(boxes=[], classes=[], image_sizes=image_sizes, ignored=[])
    instances = [item["instances"] for item in batched_inputs]
    return Targets(
        boxes=[x.gt_boxes.tensor.cpu() for x in instances],
        classes=[x.gt_classes.cpu() for x in instances],
        image_sizes=image_sizes,
        ignored=[item["ignored_boxes"].cpu() for item in batched_inputs]
        if all("ignored_boxes" in item for item in batched_inputs)
        else [],
    )
