"""Detectron2's dataset mapper, with errors that name the image, and with ignored regions."""

import os
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from kd_det.data.image_sizes import UNREADABLE, cannot_read


class CheckedDatasetMapper(DatasetMapper):
    """
    Detectron2's `DatasetMapper`, saying which file of which data set cannot be read.

    Built like its base: `CheckedDatasetMapper(cfg, is_train=True)`. Crowd annotations, which the
    base drops, are kept as boxes under "ignored_boxes", (I, 4), beside the "instances".
    """

    augmentations: Any

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Map one record of a data set to a model input.

        Raises:
            RuntimeError: the image is missing, truncated, no image, or resized to nothing.
        """
        crowds = [a for a in dataset_dict.get("annotations", []) if a.get("iscrowd", 0)]
        original, recorder = self.augmentations, _Recorder(self.augmentations)
        self.augmentations = recorder
        try:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
        except UNREADABLE as error:
            file_name = dataset_dict["file_name"]
            raise cannot_read(file_name, _origin(file_name), error) from error
        except _NotAugmentedError as error:
            file_name = dataset_dict["file_name"]
            raise RuntimeError(
                f"cannot resize {file_name} of data set {_origin(file_name)}, {error}; take its "
                "image out of the annotation file, or change INPUT.MIN_SIZE_* and INPUT.MAX_SIZE_*"
            ) from error
        finally:
            self.augmentations = original
        if "instances" in mapped and recorder.transforms is not None:
            mapped["ignored_boxes"] = _moved(
                crowds, recorder.transforms, mapped["image"].shape[-2:]
            )
        return mapped


class _NotAugmentedError(ValueError):
    """An image cannot be augmented; says of which size it is."""


class _Recorder:
    """Augments, and remembers the transforms that came of it."""

    def __init__(self, augmentations: Any) -> None:
        self._augmentations = augmentations
        self.transforms: T.TransformList | None = None

    def __call__(self, aug_input: Any) -> Any:
        height, width = aug_input.image.shape[:2]
        try:
            self.transforms = self._augmentations(aug_input)
        except ValueError as error:
            raise _NotAugmentedError(f"{width} x {height} pixels: {error}") from error
        return self.transforms


def _moved(
    annotations: list[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]
) -> torch.Tensor:
    """Return the annotations' boxes in the augmented image of (height, width) `size`, (I, 4)."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    if not boxes:
        return torch.zeros(0, 4)
    moved = torch.as_tensor(transforms.apply_box(np.array(boxes)), dtype=torch.float32)
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(moved.clamp(min=0), limit)


def _origin(file_name: str) -> str:
    """Return the registered data sets whose image folder holds the file."""
    path = os.path.abspath(file_name)
    roots = {name: MetadataCatalog.get(name).get("image_root") for name in MetadataCatalog.list()}
    names = [
        name
        for name, root in roots.items()
        if root and path.startswith(os.path.join(os.path.abspath(root), ""))
    ]
    return " or ".join(names) or "(not registered by name)"
