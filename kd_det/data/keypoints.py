"""What Detectron2 must know of a data set's keypoints: names, left and right, and bones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_det.data.annotation_file import read_annotation_file

# Okabe and Ito's colours, told apart by everybody.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167))


def keypoint_metadata(json_file: Path) -> dict[str, Any]:
    """
    Read names and skeleton of the keypoints from the categories of a COCO file.

    Names that differ by "left" and "right" alone change places when an image is flipped.

    Args:
        json_file: annotations whose objects have keypoints.

    Returns:
        `keypoint_names`, `keypoint_flip_map` and `keypoint_connection_rules` for Detectron2's
        MetadataCatalog.

    Raises:
        ValueError: no category names its keypoints, or two name them differently.
    """
    categories = read_annotation_file(json_file)["categories"]
    described = [item for item in categories if item.get("keypoints")]
    if not described:
        raise ValueError(
            f"{json_file}: its objects have keypoints, but no category names them; give one a "
            '"keypoints" list of names (and a "skeleton", for pictures), as COCO does.'
        )
    names = list(described[0]["keypoints"])
    other = next((item for item in described if list(item["keypoints"]) != names), None)
    if other is not None:
        raise ValueError(
            f"{json_file}: the categories {described[0]['name']!r} and {other['name']!r} name "
            "different keypoints, and a Detectron2 model has one set of them; use one list."
        )
    return {
        "keypoint_names": names,
        "keypoint_flip_map": flip_map(names),
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], _COLOURS[i % len(_COLOURS)])
            for i, (a, b) in enumerate(described[0].get("skeleton") or [])
        ],
    }


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs (left, right) of names that differ by these words alone."""
    return [
        (name, name.replace("left", "right"))
        for name in names
        if "left" in name and name.replace("left", "right") in names
    ]
