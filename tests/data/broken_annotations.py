"""A valid annotation file of three images, and some hundred ways of breaking it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

Content = dict[str, Any]
WIDTH, HEIGHT = 24, 16


@dataclass(frozen=True)
class Case:
    """
    One file.

    Attributes:
        name: of the test.
        change: of the valid content; what it returns, if anything, is written in its place.
        message: what the refusal says beside the file; None for a file that does no harm.
        masks, keypoints: what the model needs.
    """

    name: str
    change: Callable[[Content], Any]
    message: str | None = None
    masks: bool = False
    keypoints: bool = False


def write_images(folder: Path) -> None:
    """Write the three images."""
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        pixels = np.full((HEIGHT, WIDTH, 3), 90 + i, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")


def valid() -> Content:
    """Objects as polygons, run lengths and packed run lengths, with keypoints; one is a crowd."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[2:8, 3:11] = 1
    packed = coco_mask.encode(mask)["counts"].decode()
    edges = np.flatnonzero(np.diff(mask.flatten("F"), prepend=0, append=0))
    runs = np.diff([0, *edges, mask.size]).tolist()
    segmentations: list[Any] = [
        [[3, 2, 11, 2, 11, 8, 3.5, 8]],
        {"size": [HEIGHT, WIDTH], "counts": packed},
        {"size": [HEIGHT, WIDTH], "counts": runs},
    ]
    return {
        "info": {"any": "thing"},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(3)
        ],
        "categories": [{"id": 4, "name": "fox"}, {"id": 5, "name": "owl"}],
        "annotations": [
            {
                "id": 10 + i,
                "image_id": i,
                "category_id": 4 + i % 2,
                "bbox": [3, 2, 8, 6.0],
                "area": 48,
                "iscrowd": int(i == 2),
                "segmentation": segmentation,
                "keypoints": [4, 4, 2, 0, 0, 0],
                "num_keypoints": 1,
            }
            for i, segmentation in enumerate(segmentations)
        ],
    }


def write_json(path: Path, case: Case) -> None:
    """Write the case's file."""
    content = valid()
    changed = case.change(content)
    if isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        path.write_text(json.dumps(content if changed is None else changed[0]))


def set_value(group: str, index: int, key: str, value: Any) -> Callable[[Content], None]:
    """Set a value of an entry."""
    return lambda content: content[group][index].__setitem__(key, value)


def _image(key: str, value: Any) -> Callable[[Content], None]:
    return set_value("images", 1, key, value)


def _object(key: str, value: Any) -> Callable[[Content], None]:
    return set_value("annotations", 0, key, value)


def drop(group: str, index: int, key: str) -> Callable[[Content], None]:
    """Take a value of an entry out."""

    def change(content: Content) -> None:
        content[group][index].pop(key)

    return change


def put(keys: tuple[Any, ...], value: Any) -> Callable[[Content], None]:
    """Set a value deep inside of the first annotation."""

    def change(content: Content) -> None:
        node = content["annotations"][0]
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def _whole(value: Any) -> Callable[[Content], Any]:
    return lambda content: (value,)


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Content], bytes]:
    return lambda content: change(json.dumps(content).encode())


def files() -> list[Case]:
    """What is wrong with the file as a whole."""
    no_json = "is not a JSON file: .* make or download it again"
    return [
        Case("truncated", _raw(lambda b: b[:200]), no_json),
        Case("empty", _raw(lambda b: b""), no_json),
        Case("blank", _raw(lambda b: b" \n"), no_json),
        Case("binary", _raw(lambda b: bytes(range(256))), no_json),
        Case("zeros", _raw(lambda b: bytes(500)), no_json),
        Case("utf-16", _raw(lambda b: b.decode().encode("utf-16")), no_json),
        Case("byte order mark", _raw(lambda b: b"\xef\xbb\xbf" + b), no_json),
        Case("nested", _raw(lambda b: b'{"images": ' + b"[" * 99999), no_json),
        Case("a number of 9999 digits", _raw(lambda b: b'{"a": ' + b"9" * 9999 + b"}"), no_json),
        Case("two files in one", _raw(lambda b: b + b), no_json),
        Case("python", _raw(lambda b: b.replace(b'"', b"'")), no_json),
        Case("html", _raw(lambda b: b"<html>404</html>"), no_json),
        Case("list", lambda c: ([c],), "holds list, expected an annotation file in COCO"),
        Case("null", _whole(None), "holds NoneType, expected an annotation file"),
        Case("text", _whole("x"), "holds str, expected"),
        Case("number", _whole(1), "holds int, expected"),
        Case("mapping without anything", _whole({}), "is empty: it lists no images"),
        Case("unknown keys", lambda c: c.update(licenses=None, x=[1])),
    ]


def entries() -> list[Case]:
    """What is wrong with the lists and ids."""
    cases = [
        Case("no images", lambda c: c.pop("images") and None, "it lists no images"),
        Case("images null", lambda c: c.update(images=None), "it lists no images"),
        Case("images a mapping", lambda c: c.update(images={"0": 1}), "image entries are .*a list"),
        Case("images a text", lambda c: c.update(images="0.png"), "image entries are '0.png'"),
        Case(
            "an image is null", lambda c: c["images"].append(None), "image entry number 3 is None"
        ),
        Case(
            "an image is a list", lambda c: c["images"].append([]), r"image entry number 3 is \[\]"
        ),
        Case("no categories", lambda c: c.pop("categories") and None, "lists no categories"),
        Case("categories null", lambda c: c.update(categories=None), "lists no categories"),
        Case("categories texts", lambda c: c.update(categories=["fox"]), "category entry number 0"),
        Case(
            "annotations null", lambda c: c.update(annotations=None), "annotation entries are None"
        ),
        Case(
            "annotations a mapping",
            lambda c: c.update(annotations={}),
            "entries are {}, expected a",
        ),
        Case(
            "annotations numbers",
            lambda c: c.update(annotations=[1]),
            "annotation entry number 0 is 1",
        ),
        Case("no annotations", lambda c: c.pop("annotations") and None),
        Case("empty annotations", lambda c: c["annotations"].clear()),
        Case("ids of images mixed", _image("id", "a"), "some image ids are numbers"),
        Case("file_name null", _image("file_name", None), "image 1 has file_name None"),
        Case("file_name a number", _image("file_name", 7), "image 1 has file_name 7"),
        Case("file_name empty", _image("file_name", ""), "image 1 has file_name ''"),
        Case("file_name a folder", _image("file_name", "./"), r"image 1 has file_name '\./'"),
        Case("file_name absent", _image("file_name", "x.png"), "1 of 3 images are missing"),
        Case("file_name with NUL", _image("file_name", "a\0/b"), "1 of 1 images are missing"),
        Case("file_name broken text", _image("file_name", "\ud800"), "images are missing"),
        Case("file_name of 9999", _image("file_name", "a" * 9999), "images are missing"),
        Case("folder absent", _image("file_name", "x/1.png"), "1 of 1 images are missing"),
        Case("two images with one id", _image("id", 0), "two entries have the image id 0"),
        Case(
            "two annotations with one id",
            set_value("annotations", 1, "id", 10),
            "the annotation id 10",
        ),
        Case(
            "two categories with one id", set_value("categories", 1, "id", 4), "the category id 4"
        ),
        Case("two classes of one name", set_value("categories", 1, "name", "fox")),
        Case("an image without objects", lambda c: c["annotations"].pop() and None),
        Case("negative ids", set_value("annotations", 1, "id", -3)),
        Case(
            "category name null",
            set_value("categories", 0, "name", None),
            "has the name None, expected a",
        ),
        Case(
            "category name a number",
            set_value("categories", 0, "name", 1),
            "has the name 1, expected a",
        ),
        Case(
            "category id text",
            set_value("categories", 0, "id", "4"),
            "category id '4' is no whole number",
        ),
        Case("category_id text", _object("category_id", "4"), "has category_id '4'; the"),
        Case("category_id unknown", _object("category_id", 9), "has category_id 9; the"),
        Case("category_id null", _object("category_id", None), "has category_id None; the"),
        Case("category_id a list", _object("category_id", [4]), "has category_id .4.; the"),
        Case("image_id unknown", _object("image_id", 9), "has image_id 9, which the file"),
        Case("image_id text", _object("image_id", "0"), "has image_id '0', which the"),
        Case("image_id a list", _object("image_id", [0]), r"has image_id \[0\], which"),
        Case("image_id null", _object("image_id", None), "has image_id None, which"),
        Case("id of an annotation text", _object("id", "a"), "an id that is no whole"),
    ]
    for group, kind in (("images", "image"), ("annotations", "annotation"), ("categories", "cat")):
        for shown, value in (("None", None), (r"\[1\]", [1]), ("1.5", 1.5), ("True", True)):
            message = f"{kind}.* entry number 1 has the id {shown}"
            cases.append(Case(f"id of {group} {shown}", set_value(group, 1, "id", value), message))
    needed = {"image": ("id", "file_name", "width", "height"), "category": ("id", "name")}
    needed["annotation"] = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    for kind, keys in needed.items():
        group = "categories" if kind == "category" else f"{kind}s"
        for key in keys:
            message = rf"{kind} .* lacks \['{key}'\] of \["
            cases.append(Case(f"{kind} without {key}", drop(group, 1, key), message))
    return cases
