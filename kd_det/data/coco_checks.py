"""What must hold of a data set in COCO format before a run begins on it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# The metrics read area and iscrowd of every object, but only after hours of training.
_OF_IMAGES = ("id", "file_name", "width", "height")
_OF_ANNOTATIONS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def check_coco(name: str, json_file: Path, images: Path) -> None:
    """
    Check an annotation file and the presence of its images. Pixels are not read.

    Args:
        name: of the data set, for messages.
        json_file: annotation file in COCO format.
        images: folder that its file names are relative to.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: not JSON, no images, no categories, an id that occurs twice or refers to
            nothing, or an object without what training and evaluation read.
    """
    where = f"data set {name!r} ({json_file})"
    if not json_file.is_file():
        raise FileNotFoundError(f"{where}: there is no such annotation file")
    try:
        content = json.loads(json_file.read_text())
    except ValueError as error:
        raise ValueError(f"{where} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or not content.get("images"):
        raise ValueError(f"{where} is empty: it lists no images")
    if not content.get("categories"):
        raise ValueError(f"{where} lists no categories")
    # Without "annotations" the file describes a test set: images to predict on.
    annotations = content.get("annotations", [])
    _check_entries(where, "image", content["images"], _OF_IMAGES)
    _check_entries(where, "category", content["categories"], ("id", "name"))
    _check_entries(where, "annotation", annotations, _OF_ANNOTATIONS)
    _check_annotations(where, content, annotations)
    _check_images(where, images, [str(image["file_name"]) for image in content["images"]])


def _check_entries(
    where: str, kind: str, entries: Sequence[Mapping[str, Any]], needed: Sequence[str]
) -> None:
    seen: set[Any] = set()
    for entry in entries:
        missing = [key for key in needed if key not in entry]
        if missing:
            raise ValueError(f"{where}: {kind} {entry.get('id')} lacks {missing} of {list(needed)}")
        if entry["id"] in seen:
            raise ValueError(f"{where}: two entries have the {kind} id {entry['id']}")
        seen.add(entry["id"])


def _check_annotations(
    where: str, content: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
) -> None:
    categories = sorted(category["id"] for category in content["categories"])
    valid_categories = set(categories)
    valid_images = {image["id"] for image in content["images"]}

    def fail(annotation: Mapping[str, Any], problem: str) -> NoReturn:
        raise ValueError(f"{where}: annotation {annotation['id']} {problem}")

    for annotation in annotations:
        if annotation["category_id"] not in valid_categories:
            found = annotation["category_id"]
            fail(annotation, f"has category_id {found}; the file's categories are {categories}")
        if annotation["image_id"] not in valid_images:
            fail(annotation, f"has image_id {annotation['image_id']}, which the file does not list")
        if len(annotation["bbox"]) != 4 or min(annotation["bbox"][2:]) < 0:
            fail(annotation, f"has bbox {annotation['bbox']}; expected [x, y, width, height]")


def _check_images(where: str, images: Path, names: Sequence[str]) -> None:
    """Look for the files with one listing per folder: fast on network file systems as well."""
    by_folder: dict[Path, list[str]] = {}
    for name in names:
        path = images / name
        by_folder.setdefault(path.parent, []).append(path.name)
    for folder, expected in by_folder.items():
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        missing = [file for file in expected if file not in present]
        if missing:
            raise FileNotFoundError(
                f"{where}: {len(missing)} of {len(expected)} images are missing from {folder}, "
                f"the first is {missing[0]}"
            )
