"""
What a dense detector predicts at every position, read from the raw outputs of its head.

A distiller sees it as `DensePredictions` and knows no detector. A detector brings one function:

    @register_decoder(MyDetector)
    def _decode_mine(model: MyDetector, outputs: HeadOutputs) -> DensePredictions: ...

Its subclasses are served by it too, unless they register their own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from kd_det.functional.boxes import anchors_at
from kd_det.functional.level_grid import Grid, cells_on_images, grid_positions

# What a head returns: for each output (class logits first), one (N, D, H, W) per level.
HeadOutputs = Sequence[list[Tensor]]


@dataclass(frozen=True)
class DensePredictions:
    """
    Predictions at every position, per level, in pixels of the model's (padded) input.

    A level of H * W positions with A anchors each has R = H * W * A predictions, row by row, the
    anchors of a position next to each other.

    Args:
        logits: (N, R, K) class logits.
        boxes: (N, R, 4) corners, not clipped to the image; float32 at least.
        strides: of each level.
        sizes: (H, W) of each level.
        offset: place of a position in its cell as a fraction of the stride, 0.5 for the centre.
        anchors: (A, 2) width and height of the anchors of a position, per level; None where the
            decoder does not say.
        distributions: (N, R, 4, n + 1) logits of the bins 0 .. n that the sides (left, top, right,
            bottom) lie in; None where boxes are predicted as numbers.
        quality: (N, R) logits of how good each box is; None where the head does not say.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    strides: list[float]
    sizes: list[tuple[int, int]]
    offset: float
    anchors: list[Tensor] | None = None
    distributions: list[Tensor] | None = None
    quality: list[Tensor] | None = None

    def anchors_per_position(self) -> int:
        """Return A."""
        height, width = self.sizes[0]
        return self.logits[0].shape[1] // (height * width)

    def level(self, index: int, size: tuple[int, int]) -> "LevelPredictions":
        """
        Return the predictions of one level at its first positions.

        Args:
            index: of the level.
            size: (H', W') at most that of the level; what is cut off at the right and the bottom
                must be padding.
        """

        def cut(values: Tensor) -> Tensor:
            if size == self.sizes[index]:
                return values
            cells = values.unflatten(1, (*self.sizes[index], -1))
            return cells[:, : size[0], : size[1]].flatten(1, 3)

        more = [None if x is None else cut(x[index]) for x in (self.distributions, self.quality)]
        return LevelPredictions(cut(self.logits[index]), cut(self.boxes[index]), *more)

    def scaled(self, factor: float) -> "DensePredictions":
        """Return the same predictions in the pixels of an image `factor` times as large."""
        if factor == 1:
            return self
        return replace(
            self,
            boxes=[x * factor for x in self.boxes],
            strides=[x * factor for x in self.strides],
            anchors=None if self.anchors is None else [x * factor for x in self.anchors],
        )


@dataclass(frozen=True)
class LevelPredictions:
    """
    One model's predictions on one level; see `DensePredictions`.

    Args:
        logits: (N, R, K).
        boxes: (N, R, 4).
        distributions: (N, R, 4, n + 1), or None.
        quality: (N, R), or None.
    """

    logits: Tensor
    boxes: Tensor
    distributions: Tensor | None = None
    quality: Tensor | None = None


@dataclass
class PredictionPair:
    """
    Predictions of student and teacher at the same positions, in pixels of the loaded image.

    Attributes:
        name: e.g. "stride 8".
        grid: the common positions.
        student: carries the graph.
        teacher: no gradient.
        anchors: (A, 2) width and height of the anchors, the student's if it has its own, where
            the decoder says.
        image_sizes: (N, 2) float, height and width of each loaded image without padding.
        masks: cells on images of every grid asked for so far; the pairs of a step share it.
    """

    name: str
    grid: Grid
    student: LevelPredictions
    teacher: LevelPredictions
    anchors: Tensor | None
    image_sizes: Tensor
    masks: dict[Grid, Tensor] = field(default_factory=dict, repr=False)

    @property
    def stride(self) -> float:
        """Pixels of the loaded image per cell."""
        return self.grid.stride

    def anchor_boxes(self) -> Tensor:
        """Return the anchors at all positions, (R, 4) corners in pixels of the loaded image."""
        assert self.anchors is not None  # checked when the model was built
        positions = grid_positions([self.grid], self.student.logits.device)
        return anchors_at(positions.float(), self.anchors.float())

    def valid(self) -> Tensor:
        """Return (N, R) float32 in {0, 1}: 1 where a position lies on the image."""
        if self.grid not in self.masks:
            cells = cells_on_images(self.grid, self.image_sizes)
            self.masks[self.grid] = cells[:, None].float()
        count = self.student.logits.shape[1] // (self.grid.height * self.grid.width)
        return self.masks[self.grid].flatten(1).repeat_interleave(count, dim=1)


Decoder = Callable[[Any, HeadOutputs], DensePredictions]
_DECODERS: dict[type, Decoder] = {}


def register_decoder(detector: type[nn.Module]) -> Callable[[Decoder], Decoder]:
    """
    Make the decorated function the decoder of a detector class and its subclasses.

    Args:
        detector: the class.

    Returns:
        The decorator.

    Raises:
        ValueError: the class has a decoder already.
    """

    def register(decoder: Decoder) -> Decoder:
        if detector in _DECODERS:
            raise ValueError(f"{detector.__name__} has a decoder already: {_DECODERS[detector]}.")
        _DECODERS[detector] = decoder
        return decoder

    return register


def decoder_of(model: nn.Module) -> Callable[[HeadOutputs], DensePredictions]:
    """
    Find what decodes the raw outputs of a dense detector's head.

    Args:
        model: the detector.

    Returns:
        A function of what `model.head` returned, in training or evaluation mode alike. It leaves
        the outputs as they are, and gradients reach them.

    Raises:
        TypeError: no decoder is registered for the class or one it derives from.
    """
    for cls in type(model).__mro__:
        if cls in _DECODERS:
            return functools.partial(_DECODERS[cls], model)
    known = ", ".join(sorted(cls.__name__ for cls in _DECODERS))
    raise TypeError(
        f"Nothing decodes the dense predictions of {type(model).__name__}; known are {known} and "
        "their subclasses. Write one function and register it with "
        "kd_det.distillers.predictions.register_decoder."
    )


def decode_dense(model: nn.Module, head_outputs: HeadOutputs) -> DensePredictions:
    """Decode once; see `decoder_of`."""
    return decoder_of(model)(head_outputs)
