"""
What a dense detector predicts at every position, read from the raw outputs of its head.

A distiller sees it as `DensePredictions` and knows no detector. A detector brings one function:

    @register_decoder(MyDetector)
    def _decode_mine(model: MyDetector, outputs: HeadOutputs) -> DensePredictions: ...

Its subclasses are served by it too, unless they register their own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

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
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    strides: list[float]
    sizes: list[tuple[int, int]]
    offset: float

    def scaled(self, factor: float) -> "DensePredictions":
        """Return the same predictions in the pixels of an image `factor` times as large."""
        if factor == 1:
            return self
        return replace(
            self,
            boxes=[x * factor for x in self.boxes],
            strides=[x * factor for x in self.strides],
        )


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
