"""Decoders of heads that predict boxes relative to anchors: Detectron2's, and what others need."""

from collections.abc import Callable

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor

from kd_det.distillers.predictions import DensePredictions, HeadOutputs, register_decoder
from kd_det.functional.precision import at_least_float32


def decode_levels(
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
        The predictions; gradients reach the head's outputs.

    Raises:
        ValueError: levels with different numbers of anchors per position.
    """
    class_maps, box_maps = head_outputs[0], head_outputs[1]
    logits, boxes, sizes, counts = [], [], [], []
    # Of its argument the anchor generator reads the sizes alone, which the head keeps.
    for class_map, box_map, anchors in zip(
        class_maps, box_maps, model.anchor_generator(class_maps), strict=True
    ):
        count = class_map.shape[1] // model.num_classes
        outputs = at_least_float32(permute_to_N_HWA_K(box_map, box_map.shape[1] // count))
        repeated = anchors.tensor.repeat(len(outputs), 1)
        with torch.autocast(box_map.device.type, enabled=False):
            flat = decode(outputs.flatten(0, 1), repeated)
        logits.append(permute_to_N_HWA_K(class_map, model.num_classes))
        boxes.append(flat.unflatten(0, outputs.shape[:2]))
        sizes.append((class_map.shape[-2], class_map.shape[-1]))
        counts.append(count)
    if len(set(counts)) != 1:
        raise ValueError(f"The levels have different numbers of anchors per position: {counts}.")
    strides = [float(stride) for stride in model.anchor_generator.strides]
    return DensePredictions(logits, boxes, strides, sizes, float(model.anchor_generator.offset))


@register_decoder(FCOS)
@register_decoder(RetinaNet)
def _decode_deltas(model: FCOS | RetinaNet, head_outputs: HeadOutputs) -> DensePredictions:
    return decode_levels(model, head_outputs, model.box2box_transform.apply_deltas)
