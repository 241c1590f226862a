"""
What must hold of one annotation in COCO format.

pycocotools takes its numbers as they are: a coordinate that is infinite or a billion pixels off the
image costs the memory of the machine, or ends the process. Detectron2 drops an object whose box or
polygons hold NaN without a word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from kd_det.data.annotation_file import is_whole, shown
from kd_det.data.run_lengths import find_run_length_problem

# Objects may extend beyond their image, as annotators complete what is cut off. Whatever is farther
# away than this many times the image's longer side is a mistake.
REACH = 10


def find_problem(
    annotation: Mapping[str, Any], image: Mapping[str, Any], *, masks: bool, keypoints: bool
) -> str:
    """
    Return what is wrong with an annotation, as a sentence goes on: "has bbox ...; expected ...".

    Args:
        annotation: with bbox, area and iscrowd.
        image: its image's entry, with whole width and height of at least 1.
        masks, keypoints: it must have a segmentation, or keypoints.

    Returns:
        The problem, empty where there is none.
    """
    return (
        _in_box(annotation["bbox"], image)
        or _in_flags(annotation, image)
        or _in_segmentation(annotation, image, needed=masks)
        or _in_keypoints(annotation, image, needed=keypoints)
    )


def within(values: Iterable[Any], low: float, high: float) -> bool:
    """Return whether all values are numbers (true and "1" are none) from `low` to `high`."""
    return all(type(value) in (int, float) and low <= value <= high for value in values)


def _bounds(image: Mapping[str, Any]) -> tuple[int, int]:
    side = max(image["width"], image["height"])
    return -REACH * side, (REACH + 1) * side


def _reach(image: Mapping[str, Any]) -> str:
    low, high = _bounds(image)
    return f"numbers from {low} to {high}, for an image of {image['width']} x {image['height']}"


def _in_box(box: Any, image: Mapping[str, Any]) -> str:
    low, high = _bounds(image)
    if isinstance(box, list) and len(box) == 4 and within(box, low, high):
        x, y, width, height = box
        if min(width, height) >= 0 and max(x + width, y + height) <= high:
            return ""
    return (
        f"has bbox {shown(box)}; expected [x, y, width, height], {_reach(image)}, width and height "
        "of at least 0"
    )


def _in_flags(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    low, high = _bounds(image)
    if not within([annotation["area"]], 0, (high - low) ** 2):
        return f"has area {shown(annotation['area'])}; expected pixels from 0 on"
    if not _is_flag(annotation["iscrowd"], (0, 1)):
        return f"has iscrowd {shown(annotation['iscrowd'])}; expected the number 0 or 1"
    if not _is_flag(annotation.get("ignore", 0), (0,)):
        return (
            f"has ignore {shown(annotation['ignore'])}, which Detectron2 does not read; expected "
            "iscrowd 1 for a region to ignore"
        )
    return ""


def _is_flag(value: Any, expected: tuple[int, ...]) -> bool:
    return isinstance(value, int | float) and value in expected


def _in_segmentation(
    annotation: Mapping[str, Any], image: Mapping[str, Any], *, needed: bool
) -> str:
    found = annotation.get("segmentation")
    if found is None or found == []:
        return f"has segmentation {found}, but the model is one of masks" if needed else ""
    if isinstance(found, dict):
        problem = find_run_length_problem(found, image["width"], image["height"])
        return f"has a segmentation in run lengths {problem}" if problem else ""
    if not isinstance(found, list) or not all(isinstance(polygon, list) for polygon in found):
        return (
            f"has segmentation {shown(found)}; expected a list of polygons [[x, y, x, y, ...], "
            '...] or run lengths {"size": ..., "counts": ...}'
        )
    low, high = _bounds(image)
    for polygon in found:
        if not within(polygon, low, high):
            bad = next(value for value in polygon if not within([value], low, high))
            return f"has {shown(bad)} in its segmentation; expected {_reach(image)}"
    # Detectron2 leaves short polygons out, and with its last one the whole object.
    if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in found):
        return (
            f"has segmentation {shown(found)}; expected polygons of at least three points, six "
            "numbers"
        )
    return ""


def _in_keypoints(annotation: Mapping[str, Any], image: Mapping[str, Any], *, needed: bool) -> str:
    found = annotation.get("keypoints")
    if found is None or found == []:
        return f"has keypoints {found}, but the model is one of keypoints" if needed else ""
    low, high = _bounds(image)
    if not isinstance(found, list) or len(found) % 3 or not within(found, low, high):
        return f"has keypoints {shown(found)}; expected [x, y, v, ...], {_reach(image)}"
    if not all(_is_flag(value, (0, 1, 2)) for value in found[2::3]):
        return f"has keypoints {shown(found)}; expected each third number to be 0, 1 or 2"
    count = annotation.get("num_keypoints", None if needed else 0)
    if not (is_whole(count) and count >= 0):
        return f"has num_keypoints {shown(count)}; expected the number of its labelled keypoints"
    return ""
