"""
What a dense detector predicts at every position, read from the raw outputs of its head.

A new dense detector is one function:

    @register_decoder(MyDetector)
    def _decode_mine(model: MyDetector, head_outputs: HeadOutputs) -> DensePredictions: ...

Its subclasses are served by it too, unless they register their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from kd_det.functional.boxes import box_centers
from kd_det.functional.precision import at_least_float32
from kd_det.modeling.dense.single_anchor import SingleAnchorDetector

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
        positions: (H * W, 2) x, y of the anchors' centres.
        strides: of each level.
        sizes: (H, W) of each level.
        offset: place of a position in its cell as a fraction of the stride, 0.5 for the centre.
        anchors_per_position: A.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    positions: list[Tensor]
    strides: list[float]
    sizes: list[tuple[int, int]]
    offset: float
    anchors_per_position: int

    def scaled(self, factor: float) -> "DensePredictions":
        """Return the same predictions in the pixels of an image `factor` times as large."""
        if factor == 1:
            return self
        return replace(
            self,
            boxes=[x * factor for x in self.boxes],
            positions=[x * factor for x in self.positions],
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


def decode_dense(model: nn.Module, head_outputs: HeadOutputs) -> DensePredictions:
    """
    Decode the raw outputs of a dense detector's head, which stay as they are.

    Args:
        model: the detector; in training or evaluation mode alike.
        head_outputs: what `model.head` returned.

    Returns:
        The predictions; gradients reach the head's outputs.

    Raises:
        TypeError: no decoder is registered for the class or one it derives from.
    """
    for cls in type(model).__mro__:
        if cls in _DECODERS:
            return _DECODERS[cls](model, head_outputs)
    known = ", ".join(sorted(cls.__name__ for cls in _DECODERS))
    raise TypeError(
        f"Nothing decodes the dense predictions of {type(model).__name__}; known are {known} and "
        "their subclasses. Write one function and register it with "
        "kd_det.modeling.dense.predictions.register_decoder."
    )


@register_decoder(FCOS)
@register_decoder(RetinaNet)
def _decode_deltas(model: DenseDetector, head_outputs: HeadOutputs) -> DensePredictions:
    return _decode_levels(model, head_outputs, model.box2box_transform.apply_deltas)


@register_decoder(SingleAnchorDetector)
def _decode_single_anchor(
    model: SingleAnchorDetector, head_outputs: HeadOutputs
) -> DensePredictions:
    return _decode_levels(model, head_outputs, model.decode_boxes)


def _decode_levels(
    model: DenseDetector,
    head_outputs: HeadOutputs,
    decode: Callable[[Tensor, Tensor], Tensor],
) -> DensePredictions:
    """
    Decode with the detector's own anchors.

    Args:
        model: has `anchor_generator` and `num_classes`.
        head_outputs: class logits and box outputs first.
        decode: from box outputs (P, D) and anchors (P, 4) to boxes (P, 4).

    Returns:
        The predictions.
    """
    class_maps, box_maps = head_outputs[0], head_outputs[1]
    logits, boxes, positions, sizes, counts = [], [], [], [], []
    # Of its argument the anchor generator reads the sizes alone, which the head keeps.
    for class_map, box_map, anchors in zip(
        class_maps, box_maps, model.anchor_generator(class_maps), strict=True
    ):
        count = class_map.shape[1] // model.num_classes
        outputs = at_least_float32(_rows(box_map, count))
        repeated = anchors.tensor.repeat(len(outputs), 1)
        with torch.autocast(box_map.device.type, enabled=False):
            flat = decode(outputs.flatten(0, 1), repeated)
        logits.append(_rows(class_map, count))
        boxes.append(flat.unflatten(0, outputs.shape[:2]))
        positions.append(box_centers(anchors.tensor[::count]))
        sizes.append((class_map.shape[-2], class_map.shape[-1]))
        counts.append(count)
    if len(set(counts)) != 1:
        raise ValueError(f"The levels have different numbers of anchors per position: {counts}.")
    strides = [float(stride) for stride in model.anchor_generator.strides]
    offset = float(model.anchor_generator.offset)
    return DensePredictions(logits, boxes, positions, strides, sizes, offset, counts[0])


def _rows(maps: Tensor, anchors: int) -> Tensor:
    """Turn (N, A * D, H, W) into (N, H * W * A, D)."""
    n, channels, height, width = maps.shape
    by_anchor = maps.reshape(n, anchors, channels // anchors, height, width)
    return by_anchor.permute(0, 3, 4, 1, 2).reshape(n, height * width * anchors, -1)
