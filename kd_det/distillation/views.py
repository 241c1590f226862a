"""
What a model sees of the batch: the loaded image, or the image reduced by a factor.

A view is a pure function of the batch. The ground truth follows the image, so a student of a
reduced view trains on its small image's own boxes, masks and keypoints. In evaluation Detectron2's
post-processing scales what it finds from the small image to the original one, as for any input
size. A whole factor scales by exactly that much: the small image of a side that is no multiple of
it stands for a slightly larger one, to which its detections are scaled before they are cut back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from torch.nn import functional as F

from kd_det.functional.resize import INTERPOLATIONS, is_whole, reduce_image

_SEES_THE_IMAGE = ("sem_seg", "proposals", "proposal_boxes")


@dataclass(frozen=True)
class View:
    """
    A reduction of every image of a batch.

    Attributes:
        factor: >= 1; sides become ceil(side / factor). 1 hands the batch through untouched.
        interpolation: see `functional.resize.reduce_image`.
    """

    factor: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(
                f"KD.STUDENT.VIEW_FACTOR is {self.factor}; the view divides the image's size by "
                "it, so expected >= 1 (2 halves both sides)."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"KD.STUDENT.VIEW_INTERPOLATION is {self.interpolation!r}, expected one of "
                f"{', '.join(INTERPOLATIONS)}."
            )

    def __call__(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return the batch as the model sees it.

        Args:
            batched_inputs: Detectron2's inputs: "image" (C, H, W), optionally "instances".

        Returns:
            New dicts; the given ones are not changed. "height" and "width" say what to scale
            detections to: the original image, as far as the small one stands for it.

        Raises:
            ValueError: an input holds something that cannot follow the view.
        """
        if self.factor == 1:
            return list(batched_inputs)
        return [self._reduce(item) for item in batched_inputs]

    def _reduce(self, item: dict[str, Any]) -> dict[str, Any]:
        blocked = [key for key in _SEES_THE_IMAGE if key in item]
        if blocked:
            raise ValueError(
                f"The input holds {', '.join(blocked)}, which a reduced view does not carry along; "
                "train on instances only, or use KD.STUDENT.VIEW_FACTOR 1."
            )
        image = reduce_image(item["image"], self.factor, self.interpolation)
        loaded, reduced = item["image"].shape[-2:], image.shape[-2:]
        # Pixels of the loaded image that one of the reduced image stands for, down and across.
        scales = [
            self.factor if is_whole(self.factor) else full / small
            for full, small in zip(loaded, reduced, strict=True)
        ]
        height, width = (
            round(original * scale * small / full)
            for original, scale, small, full in zip(
                _original_size(item), scales, reduced, loaded, strict=True
            )
        )
        out = {**item, "image": image, "height": height, "width": width}
        if "instances" in item:
            per_pixel = [1 / scale for scale in scales]
            size = (reduced[0], reduced[1])
            out["instances"] = scale_instances(item["instances"], size, *per_pixel)
        return out

    def restore(self, outputs: Any, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """
        Cut detections back to the original images.

        Args:
            outputs: what the student made of the reduced batch, one dict per image.
            batched_inputs: the batch before it was reduced.
        """
        if self.factor == 1:
            return outputs
        return [
            {key: _cut(value, _original_size(item)) for key, value in output.items()}
            for output, item in zip(outputs, batched_inputs, strict=True)
        ]


def _original_size(item: dict[str, Any]) -> tuple[int, int]:
    """Return the height and width evaluation returns to: as loaded, where no other is known."""
    height, width = item["image"].shape[-2:]
    return item.get("height", height), item.get("width", width)


def scale_instances(
    instances: Instances, size: tuple[int, int], scale_y: float, scale_x: float
) -> Instances:
    """
    Return ground truth scaled to an image of another size.

    Args:
        instances: fields gt_boxes, gt_masks (polygons or bitmaps), gt_keypoints are scaled; fields
            without geometry (gt_classes, ...) are kept.
        size: height, width of the new image.
        scale_y, scale_x: pixels of the new image per pixel of the old one.

    Raises:
        ValueError: a field's geometry is unknown.
    """
    out = Instances(size)
    for name, value in instances.get_fields().items():
        out.set(name, _scale_field(name, value, scale_x, scale_y, size))
    return out


def _scale_field(
    name: str, value: Any, scale_x: float, scale_y: float, size: tuple[int, int]
) -> Any:
    if isinstance(value, Boxes) and not isinstance(value, RotatedBoxes):
        factors = value.tensor.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return Boxes(value.tensor * factors)
    if isinstance(value, Keypoints):
        factors = value.tensor.new_tensor([scale_x, scale_y, 1.0])
        return Keypoints(value.tensor * factors)
    if isinstance(value, PolygonMasks):
        return PolygonMasks(
            [[_scale_polygon(p, scale_x, scale_y) for p in ps] for ps in value.polygons]
        )
    if isinstance(value, BitMasks):
        # What the new image's last cells lack belongs to no mask.
        height, width = value.tensor.shape[-2:]
        missing = round(size[1] / scale_x) - width, round(size[0] / scale_y) - height
        masks = F.pad(value.tensor[:, None].float(), (0, missing[0], 0, missing[1]))
        # A cell belongs to the mask if at least half of the area it stands for does.
        return BitMasks(F.interpolate(masks, size=size, mode="area")[:, 0] >= 0.5)
    if isinstance(value, torch.Tensor) and value.dim() <= 1:
        return value
    raise ValueError(
        f"Ground truth field {name} ({type(value).__name__}) has a geometry that a reduced view "
        "does not know; use KD.STUDENT.VIEW_FACTOR 1 or drop the field in the dataset mapper."
    )


def _cut(value: Any, size: tuple[int, int]) -> Any:
    """Return an output of Detectron2 (instances, a map, a map with its segments) cut to a size."""
    if isinstance(value, tuple):
        return (_cut(value[0], size), *value[1:])
    if isinstance(value, torch.Tensor):
        return value[..., : size[0], : size[1]]
    if not isinstance(value, Instances) or value.image_size == size:
        return value
    cut = Instances(size)
    kept = torch.ones(len(value), dtype=torch.bool)
    for name, field in value.get_fields().items():
        if isinstance(field, Boxes):
            field = field.clone()
            field.clip(size)
            kept = kept.to(field.device) & field.nonempty()
        elif name == "pred_masks":
            field = _cut(field, size)
        cut.set(name, field)
    return cut[kept]


def _scale_polygon(polygon: Any, scale_x: float, scale_y: float) -> Any:
    """Scale a flat array x0 y0 x1 y1 ... of one polygon."""
    scaled = polygon.copy()
    scaled[0::2] *= scale_x
    scaled[1::2] *= scale_y
    return scaled
