"""Detectors that assign by predictions, and may for one step be given another model's."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor

from kd_det.distillers.predictions import DensePredictions


class GuidedAssignment:
    """
    Mixin of a dense detector whose assignment reads predictions: its own, unless it is guided.

    The detector asks `predictions_to_assign_by` for them. It has one prediction per position.
    """

    anchor_generator: DefaultAnchorGenerator
    num_classes: int
    _guide: DensePredictions | None = None

    @contextlib.contextmanager
    def assigning_by(self, predictions: DensePredictions) -> Iterator[None]:
        """
        Inside, ground truth is assigned by these predictions and not by the detector's own.

        Args:
            predictions: another model's of the batches to come, in the pixels of this detector's
                own input.

        Raises:
            ValueError: they are of other strides, positions or classes.
        """
        self._check(predictions)
        before, self._guide = self._guide, predictions
        try:
            yield
        finally:
            self._guide = before

    def predictions_to_assign_by(
        self, logits: Tensor, boxes: Tensor, level_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """
        Return class logits (N, R, K) and boxes (N, R, 4), float32 at least, without gradient.

        Args:
            logits, boxes: the detector's own, of the same shapes.
            level_sizes: positions of each level, R together.

        Raises:
            ValueError: those given are of maps or batches of another size.
        """
        if self._guide is None:
            return logits.detach(), boxes.detach()
        found = [tuple(level.shape[:2]) for level in self._guide.logits]
        own = [(len(logits), size) for size in level_sizes]
        if found != own:
            raise ValueError(
                f"The predictions to assign by are for {found} (images, positions) on each level, "
                f"but {type(self).__name__} sees {own}; both models must see the same images, "
                "padded to the same size."
            )
        parts = (self._guide.logits, self._guide.boxes)
        guide_logits, guide_boxes = (torch.cat(x, dim=1).detach().to(boxes.dtype) for x in parts)
        return guide_logits, guide_boxes

    def _check(self, predictions: DensePredictions) -> None:
        mine = (
            [float(stride) for stride in self.anchor_generator.strides],
            float(self.anchor_generator.offset),
            self.num_classes,
            1,
        )
        theirs = (
            predictions.strides,
            predictions.offset,
            predictions.logits[0].shape[2],
            predictions.anchors_per_position(),
        )
        names = ("strides", "offset of positions", "classes", "predictions per position")
        wrong = [
            f"{name} {other} instead of {own}"
            for name, own, other in zip(names, mine, theirs, strict=True)
            if own != other
        ]
        if wrong:
            raise ValueError(
                f"{type(self).__name__} cannot assign by these predictions: {', '.join(wrong)}. "
                "Both models need the same levels, positions (MODEL.ANCHOR_GENERATOR.OFFSET) and "
                "classes, or the student assigns by its own predictions."
            )
