"""
The aquarium photographs that come with a checkout: their names, their split, and how they are made.

`python -m kd_det.data.aquarium SOURCE datasets/aquarium256` makes the folder anew. SOURCE holds the
Aquarium data set by Roboflow in COCO format at any size: *.json files anywhere below it, and each
image they name anywhere below it.

The camera numbers of the file names (IMG_2274) are taken in blocks of ten, since neighbours show
one scene, often one film. A block is in one split as a whole. Validation and test share the classes
out so that each has every class; the counts of boxes decided, no model did.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageOps

#: Blocks of ten camera numbers, by split; every other block is for training.
BLOCKS = {
    "val": (238, 242, 250, 262, 312, 316, 837, 841, 849),
    "test": (230, 234, 246, 254, 258, 832, 845, 853, 857),
}
SPLITS = ("train", *BLOCKS)
#: Parts of few and large animals, by the splits they are taken from: an easy set beside a hard one.
LARGE = {"large_train": ("train",), "large_test": ("val", "test")}
#: Bounds of LARGE: boxes of a photograph, and their median area as part of it.
MAX_BOXES, MIN_MEDIAN_AREA = 10, 0.015
#: Parts of many and small animals, the hard ones, likewise.
MANY = {"many_train": ("train",), "many_test": ("val", "test")}
#: Bounds of MANY.
MIN_BOXES, MAX_MEDIAN_AREA = 6, 0.01
SHORT_SIDE = 256


def split_of(file_name: str) -> str:
    """
    Return "train", "val" or "test" for a photograph's file name, e.g. IMG_2274_jpeg_jpg.jpg.

    Raises:
        ValueError: the name has no camera number.
    """
    match = re.match(r"IMG_(\d+)", file_name)
    if match is None:
        raise ValueError(f"{file_name} has no camera number; expected IMG_<number>... .jpg")
    block = int(match[1]) // 10
    return next((split for split, blocks in BLOCKS.items() if block in blocks), "train")


def short_side_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) at short side 256, the long one rounded to whole pixels."""
    factor = SHORT_SIDE / min(size)
    return round(size[0] * factor), round(size[1] * factor)


def scale_box(
    box: Sequence[float], old: tuple[int, int], new: tuple[int, int]
) -> list[float] | None:
    """
    Scale a box [x, y, width, height] from an image of size `old` to one of size `new`.

    Each axis has its own factor, new / old, because the long side was rounded. Returns the box
    clipped to the image, to a thousandth of a pixel; None where nothing of it lies inside.
    """
    edges = []
    for axis in (0, 1):
        factor = new[axis] / old[axis]
        ends = (box[axis], box[axis] + box[axis + 2])
        edges.append([round(min(max(end * factor, 0.0), float(new[axis])), 3) for end in ends])
    (left, right), (top, bottom) = edges
    width, height = round(right - left, 3), round(bottom - top, 3)
    return [left, top, width, height] if width > 0 and height > 0 else None


def make_aquarium(source: Path, out: Path) -> None:
    """
    Write `out`/images/*.jpg and `out`/annotations/{train,val,test}.json from SOURCE.

    Raises:
        FileNotFoundError: SOURCE has no annotation file, or lacks an image that one names.
        ValueError: an image's size, turned as its EXIF tag says, is not the annotated one.
    """
    files = {path.name: path for path in source.rglob("*.jpg")}
    contents = [json.loads(path.read_text()) for path in sorted(source.rglob("*.json"))]
    if not contents:
        raise FileNotFoundError(f"{source} holds no *.json in COCO format")
    categories = [c for c in contents[0]["categories"] if c["id"] > 0]  # 0: Roboflow's own root
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    records = sorted(_records(contents), key=lambda record: str(record[0]["file_name"]))
    made: dict[str, dict[str, Any]] = {
        split: {"images": [], "annotations": [], "categories": categories} for split in SPLITS
    }
    for image, annotations in records:
        if image["file_name"] not in files:
            raise FileNotFoundError(f"{source} lacks {image['file_name']}, which a *.json names")
        _add(made[split_of(image["file_name"])], image, annotations, files, out)
    for parts_of, choose in ((LARGE, few_and_large), (MANY, many_and_small)):
        for name, parts in parts_of.items():
            made[name] = choose([made[part] for part in parts])
    for split, content in made.items():
        lines = json.dumps(content).replace('{"id"', '\n{"id"')
        (out / "annotations" / f"{split}.json").write_text(lines + "\n")


def few_and_large(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Return the photographs with 1 to MAX_BOXES boxes of a median area of at least MIN_MEDIAN_AREA.

    Args:
        contents: in COCO format, of the same categories; one after the other, numbered anew.
    """
    return _select(contents, lambda x: 1 <= len(x) <= MAX_BOXES and median(x) >= MIN_MEDIAN_AREA)


def many_and_small(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return those with MIN_BOXES boxes or more, of a median area below MAX_MEDIAN_AREA."""
    return _select(contents, lambda x: len(x) >= MIN_BOXES and median(x) < MAX_MEDIAN_AREA)


def _select(
    contents: Sequence[dict[str, Any]], keep: Callable[[list[float]], bool]
) -> dict[str, Any]:
    """Return the photographs that `keep` chooses by its boxes' areas, as parts of it."""
    out: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": contents[0]["categories"],
    }
    for image, annotations in _records(contents):
        areas = [x["area"] / (image["width"] * image["height"]) for x in annotations]
        if not keep(areas):
            continue
        image_id = len(out["images"]) + 1
        out["images"].append({**image, "id": image_id})
        for annotation in annotations:
            box_id = len(out["annotations"]) + 1
            out["annotations"].append({**annotation, "id": box_id, "image_id": image_id})
    return out


def _records(
    contents: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for content in contents:
        boxes: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            boxes[annotation["image_id"]].append(annotation)
        yield from ((image, boxes[image["id"]]) for image in content["images"])


def _add(
    content: dict[str, Any],
    image: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    files: dict[str, Path],
    out: Path,
) -> None:
    with Image.open(files[image["file_name"]]) as opened:
        photograph = ImageOps.exif_transpose(opened).convert("RGB")
    old = (image["width"], image["height"])
    if photograph.size != old:
        raise ValueError(f"{image['file_name']} is {photograph.size}, but annotated as {old}")
    new = short_side_size(old)
    # Roboflow's exports add ".rf.<digest>" to the name.
    name = re.sub(r"\.rf\..*", ".jpg", image["file_name"])
    resized = photograph.resize(new, Image.Resampling.LANCZOS)
    resized.save(out / "images" / name, quality=75, optimize=True, progressive=True)
    image_id = len(content["images"]) + 1
    content["images"].append({"id": image_id, "file_name": name, "width": new[0], "height": new[1]})
    for annotation in annotations:
        box = scale_box(annotation["bbox"], old, new)
        if box is not None:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": annotation["category_id"],
                    "bbox": box,
                    "area": round(box[2] * box[3], 3),
                    "iscrowd": 0,
                }
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the aquarium photographs of a checkout.")
    parser.add_argument("source", type=Path, help="the data set in COCO format, at any size")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    make_aquarium(arguments.source, arguments.out)
