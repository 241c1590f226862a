"""What must hold of a data set in COCO format before a run begins on it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_det.data.annotation_checks import find_problem
from kd_det.data.annotation_file import (
    check_categories,
    check_entries,
    is_whole,
    read_annotation_file,
    shown,
)

# The metrics read area and iscrowd of every object, but only after hours of training.
_OF_IMAGES = ("id", "file_name", "width", "height")
_OF_ANNOTATIONS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
# (file, folder of images) -> what passed.
_passed: dict[tuple[str, str], "CheckedSet"] = {}
# A JPEG has no longer side, and the pixels of an image fit the 32 bits of a run length.
_MAX_SIDE = 65_535


class CheckedSet(NamedTuple):
    """
    What passed, and what else is asked about it.

    Attributes:
        stamp: what file and folder were.
        masks, keypoints: the switches.
        images: file name, width and height in pixels of each.
        classes: names in the order of the ids.
        objects: how many there are beside crowds; None where the file lists no annotations.
    """

    stamp: tuple[int, ...]
    masks: bool
    keypoints: bool
    images: tuple[tuple[str, int, int], ...]
    classes: tuple[str, ...]
    objects: int | None


def checked_coco(
    name: str, json_file: Path, images: Path, *, masks: bool = False, keypoints: bool = False
) -> CheckedSet:
    """
    Return what a data set holds that can be trained or tested on.

    It is checked, see `check_coco`, unless this process has done so and neither file nor
    folder has changed since.

    Raises:
        FileNotFoundError, ValueError: from `check_coco`.
    """
    key, stamp = (str(json_file), str(images)), _stamp(json_file, images)
    last = _passed.get(key)
    if last and last.stamp == stamp and last.masks >= masks and last.keypoints >= keypoints:
        return last
    content = check_coco(name, json_file, images, masks=masks, keypoints=keypoints)
    annotations = content.get("annotations")
    _passed[key] = CheckedSet(
        stamp=stamp,
        masks=masks,
        keypoints=keypoints,
        images=tuple((x["file_name"], x["width"], x["height"]) for x in content["images"]),
        classes=tuple(x["name"] for x in sorted(content["categories"], key=lambda x: x["id"])),
        objects=None if annotations is None else sum(not x["iscrowd"] for x in annotations),
    )
    return _passed[key]


def _stamp(json_file: Path, images: Path) -> tuple[int, ...]:
    found: list[int] = []
    for path in (json_file, images):
        if path.exists():
            status = path.stat()
            found += (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return tuple(found)


def check_coco(
    name: str, json_file: Path, images: Path, *, masks: bool = False, keypoints: bool = False
) -> dict[str, Any]:
    """
    Check an annotation file and the presence of its images. Pixels are not read.

    Args:
        name: of the data set, for messages.
        json_file: annotation file in COCO format.
        images: folder that its file names are relative to.
        masks: every object needs a segmentation, since the model learns or predicts masks.
        keypoints: every object needs keypoints.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: not JSON, no images, no categories, an id that occurs twice or refers to
            nothing, an object without what training and evaluation read, or a number that is none
            or far off the image. The message names file, entry, what was found and what to change.
    """
    where = f"data set {name!r} ({json_file})"
    try:
        content = read_annotation_file(json_file)
    except (FileNotFoundError, ValueError) as error:
        # The message starts with the file.
        raise type(error)(f"{where}{str(error).removeprefix(str(json_file))}") from error
    if not content.get("images"):
        raise ValueError(f"{where} is empty: it lists no images")
    check_categories(where, content.get("categories"))
    check_entries(where, "image", content["images"], _OF_IMAGES)
    _check_image_entries(where, content["images"])
    # Without "annotations" the file describes a test set: images to predict on.
    annotations = content.get("annotations", [])
    check_entries(where, "annotation", annotations, _OF_ANNOTATIONS)
    _check_annotations(where, content, annotations, masks=masks, keypoints=keypoints)
    _check_images(where, images, [image["file_name"] for image in content["images"]])
    return content


def _check_image_entries(where: str, entries: Sequence[Mapping[str, Any]]) -> None:
    if len({type(image["id"]) for image in entries}) > 1:
        raise ValueError(f"{where}: some image ids are numbers, others texts; use one of them")
    for image in entries:
        for key in ("width", "height"):
            if not (is_whole(image[key]) and 1 <= image[key] <= _MAX_SIDE):
                raise ValueError(
                    f"{where}: image {image['id']} ({shown(image['file_name'])}) has {key} "
                    f"{shown(image[key])}; expected its {key} in pixels, a whole number from 1 to "
                    f"{_MAX_SIDE}"
                )
        if not isinstance(image["file_name"], str) or not image["file_name"].strip("./"):
            raise ValueError(
                f"{where}: image {image['id']} has file_name {shown(image['file_name'])}; expected "
                "a path relative to the folder of images"
            )


def _check_annotations(
    where: str,
    content: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    *,
    masks: bool,
    keypoints: bool,
) -> None:
    categories = sorted(category["id"] for category in content["categories"])
    valid_categories = set(categories)
    images = {image["id"]: image for image in content["images"]}
    for annotation in annotations:
        category, image_id = annotation["category_id"], annotation["image_id"]
        image = images.get(image_id) if isinstance(image_id, int | str) else None
        if not is_whole(annotation["id"]):
            problem = f"has an id that is no whole number ({shown(annotation['id'])})"
        elif not is_whole(category) or category not in valid_categories:
            problem = f"has category_id {shown(category)}; the file's categories are {categories}"
        elif image is None:
            problem = f"has image_id {shown(image_id)}, which the file does not list"
        else:
            problem = find_problem(annotation, image, masks=masks, keypoints=keypoints)
        if problem:
            place = f" of image {image_id} ({image['file_name']})" if image else ""
            raise ValueError(
                f"{where}: annotation {shown(annotation['id'])} {problem}. Correct this annotation"
                f"{place}, or take it out of the file."
            )


def _check_images(where: str, images: Path, names: Sequence[str]) -> None:
    """Look for the files with one listing per folder: fast on network file systems as well."""
    by_folder: dict[Path, list[str]] = {}
    for name in names:
        path = images / name
        by_folder.setdefault(path.parent, []).append(path.name)
    for folder, expected in by_folder.items():
        present = _listing(folder)
        missing = [file for file in expected if file not in present]
        if missing:
            raise FileNotFoundError(
                f"{where}: {len(missing)} of {len(expected)} images are missing from {folder}, "
                f"the first is {missing[0][:200]}"
            )


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or a name that no folder can have
        return set()
