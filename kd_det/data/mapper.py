"""Detectron2's dataset mapper with an error that names the image and the data set it is from."""

import os
from typing import Any

from detectron2.data import DatasetMapper, MetadataCatalog


class CheckedDatasetMapper(DatasetMapper):
    """
    Detectron2's `DatasetMapper`, saying which file of which data set cannot be read.

    Built like its base: `CheckedDatasetMapper(cfg, is_train=True)`.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Map one record of a data set to a model input.

        Raises:
            RuntimeError: the image is missing, truncated or no image.
        """
        try:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
            return mapped
        # What Pillow raises for broken files; a broken PNG gives a SyntaxError.
        except (OSError, SyntaxError) as error:
            file_name = dataset_dict["file_name"]
            raise RuntimeError(
                f"cannot read {file_name} of data set {_origin(file_name)}: {error}; replace the "
                "file, or take its image out of the annotation file"
            ) from error


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
