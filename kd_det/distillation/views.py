"""
What a model sees of the batch: the loaded image, or the image reduced by a factor.

A view is a pure function of the batch. The ground truth follows the image, so a student of a
reduced view trains on its small image's own boxes, masks and keypoints. In evaluation Detectron2's
post-processing scales its boxes from the small image to the original one, as for any input size.
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

from kd_det.functional.resize import INTERPOLATIONS, reduce_image

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
            New dicts; the given ones are not changed. "height" and "width", where present, stay
            those of the original image.

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
        out = {**item, "image": image}
        # Evaluation returns to the loaded image's frame even where no original size is known.
        out.setdefault("height", item["image"].shape[-2])
        out.setdefault("width", item["image"].shape[-1])
        if "instances" in item:
            out["instances"] = scale_instances(
                item["instances"], (image.shape[-2], image.shape[-1])
            )
        return out


def scale_instances(instances: Instances, size: tuple[int, int]) -> Instances:
    """
    Return ground truth scaled to an image of another size.

    Args:
        instances: fields gt_boxes, gt_masks (polygons or bitmaps), gt_keypoints are scaled; fields
            without geometry (gt_classes, ...) are kept.
        size: height, width of the new image.

    Raises:
        ValueError: a field's geometry is unknown.
    """
    old_height, old_width = instances.image_size
    scale_x, scale_y = size[1] / old_width, size[0] / old_height
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
        masks = value.tensor[:, None].float()
        # A cell belongs to the mask if at least half of the area it stands for does.
        return BitMasks(F.interpolate(masks, size=size, mode="area")[:, 0] >= 0.5)
    if isinstance(value, torch.Tensor) and value.dim() <= 1:
        return value
    raise ValueError(
        f"Ground truth field {name} ({type(value).__name__}) has a geometry that a reduced view "
        "does not know; use KD.STUDENT.VIEW_FACTOR 1 or drop the field in the dataset mapper."
    )


def _scale_polygon(polygon: Any, scale_x: float, scale_y: float) -> Any:
    """Scale a flat array x0 y0 x1 y1 ... of one polygon."""
    scaled = polygon.copy()
    scaled[0::2] *= scale_x
    scaled[1::2] *= scale_y
    return scaled
