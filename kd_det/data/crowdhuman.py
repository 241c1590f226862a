"""CrowdHuman (Shao et al., 2018, arXiv:1805.00123) and own data in its `.odgt` format.

One JSON object per line and image:

    {"ID": ..., "gtboxes": [{"tag": "person", "fbox": [x, y, w, h], "extra": {"ignore": 0}}, ...]}

The full-body boxes (fbox) of persons are the only class. What is tagged otherwise (mask) or to be
ignored (extra.ignore 1) becomes iscrowd=1: Detectron2 leaves it out of training, the evaluator
takes it as an ignore region.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from kd_det.data.annotation_checks import REACH, within
from kd_det.data.synthetic_crowd import make_synthetic_crowd
from kd_det.files import cache_root, write_text

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]
_EXPECTED_LINE = '{"ID": ..., "gtboxes": [{"tag": ..., "fbox": [x, y, w, h]}, ...]}'

# Number of images and seed of the built-in synthetic crowd. Whoever changes its images renames the
# folder, since an old one may be in the cache.
_TINY = {"train": (160, 0), "val": (40, 1)}
_TINY_FOLDER = "crowd_tiny_v1"

_EXIF_ORIENTATION = 0x0112

# Pixels; how far a box may be from its own image is known when the image's size is.
_FARTHEST = 1e6


def _read_box(box: Any, where: str) -> dict[str, Any]:
    if not isinstance(box, dict) or "tag" not in box or "fbox" not in box:
        found = sorted(box) if isinstance(box, dict) else box
        raise ValueError(f'{where}: found {found}; expected at least "tag" and "fbox"')
    fbox = box["fbox"]
    if not isinstance(fbox, list) or len(fbox) != 4 or not within(fbox, -_FARTHEST, _FARTHEST):
        raise ValueError(f"{where}: fbox is {fbox}; expected four finite numbers x, y, w, h")
    extra = box.get("extra", {})
    ignore = extra.get("ignore", 0) if isinstance(extra, dict) else None
    if ignore not in (0, 1):
        raise ValueError(f'{where}: extra is {extra}; expected {{}} or {{"ignore": 0 or 1}}')
    ignored = box["tag"] != "person" or ignore == 1
    return {
        "bbox": [float(value) for value in fbox],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": int(ignored),
    }


def _read_odgt(odgt_file: Path) -> dict[str, list[dict[str, Any]]]:
    """Annotations by image ID, in the order of the file."""
    annotations: dict[str, list[dict[str, Any]]] = {}
    line_of: dict[str, int] = {}
    with open(odgt_file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{odgt_file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
                raise ValueError(
                    f"{where}: no JSON ({error}); expected {_EXPECTED_LINE}"
                ) from error
            if not isinstance(record, dict) or not {"ID", "gtboxes"} <= record.keys():
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{where}: found {found}; expected {_EXPECTED_LINE}")
            if not isinstance(record["gtboxes"], list):
                raise ValueError(
                    f"{where}: gtboxes is {record['gtboxes']!r}; expected {_EXPECTED_LINE}"
                )
            if type(record["ID"]) not in (int, str):
                raise ValueError(f"{where}: ID is {record['ID']!r}; expected the image's name")
            image_id = str(record["ID"])
            if image_id in annotations:
                raise ValueError(
                    f"{where}: ID {image_id!r} is also on line {line_of[image_id]}; "
                    "expected each image once: merge or remove one of the lines"
                )
            line_of[image_id] = number
            annotations[image_id] = [
                _read_box(box, f"{where}, box {i} of {image_id!r}")
                for i, box in enumerate(record["gtboxes"])
            ]
    if not annotations:
        raise ValueError(f"{odgt_file}: found no annotated image; expected lines {_EXPECTED_LINE}")
    return annotations


def _read_size(file: Path) -> tuple[int, int]:
    """Width and height as Detectron2 sees the image, which it turns upright by its EXIF tag."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    # What Pillow raises for broken files; a broken PNG gives a SyntaxError.
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read the size of {file}: {error}; replace the image, or take its line out of "
            "the annotation file"
        ) from error
    return (height, width) if turned else (width, height)


def _image_sizes(files: dict[str, Path], sidecar: Path) -> dict[str, tuple[int, int]]:
    """Sizes (width, height) by image ID, remembered beside the annotations.

    An entry holds for as long as the image keeps its length in bytes.
    """
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict):  # absent, or damaged: collected anew
        known = {}
    entries = {}
    for image_id, file in files.items():
        try:
            length = file.stat().st_size
        except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
            raise FileNotFoundError(
                f"no image {file} for ID {image_id!r}; expected every image of the annotation "
                f"file as {{ID}}.jpg in {file.parent}"
            ) from error
        entry: Any = known.get(image_id)
        if not _is_entry(entry) or entry[0] != length:
            entry = [length, *_read_size(file)]
        entries[image_id] = entry
    if entries != known:
        try:
            write_text(sidecar, json.dumps(entries), shared=True)
        except OSError as error:
            logger.info(
                "Image sizes are not remembered, reading them takes as long next time: %s", error
            )
    return {image_id: (width, height) for image_id, (_, width, height) in entries.items()}


def _is_entry(entry: Any) -> bool:
    whole = isinstance(entry, list) and all(type(value) is int and value > 0 for value in entry)
    return whole and len(entry) == 3


def _check_reach(where: str, box: dict[str, Any], width: int, height: int) -> None:
    x, y, w, h = box["bbox"]
    side = max(width, height)
    reach = REACH * side
    if min(x, y) < -reach or max(x + w, y + h) > side + reach:
        raise ValueError(
            f"{where} has the fbox {box['bbox']}, far off its image of {width} x {height} pixels; "
            f"expected [x, y, w, h] in pixels, from {-reach} to {side + reach}. Correct the box or "
            "take it out"
        )


def load_crowdhuman(odgt_file: StrPath, image_root: StrPath) -> list[dict[str, Any]]:
    """Reads a data set in CrowdHuman's format into Detectron2's.

    Sizes come from the headers of the images and are remembered in `<annotation file>.sizes.json`.
    Boxes are as annotated, so they may extend beyond the image. A box without area inside the image
    cannot be found by anybody: it is kept with iscrowd=1 and a warning tells how many there are.

    Args:
        odgt_file: the annotations.
        image_root: folder with {ID}.jpg for each of them.

    Returns:
        A dict per image in the order of the file: file_name, image_id (the ID, a string), height
        and width in pixels, annotations (bbox in pixels XYWH_ABS, category_id 0, iscrowd).

    Raises:
        FileNotFoundError: if the annotation file or an image is absent.
        ValueError: on a malformed line, a repeated ID or a box without fbox; names the line.
    """
    odgt_file = Path(odgt_file)
    annotations = _read_odgt(odgt_file)
    files = {image_id: Path(image_root) / f"{image_id}.jpg" for image_id in annotations}
    sizes = _image_sizes(files, odgt_file.with_suffix(".sizes.json"))
    dataset, num_outside = [], 0
    for image_id, boxes in annotations.items():
        width, height = sizes[image_id]
        for position, box in enumerate(boxes):
            _check_reach(f"{odgt_file}: box {position} of {image_id!r}", box, width, height)
            x, y, w, h = box["bbox"]
            inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
            if not inside and not box["iscrowd"]:
                box["iscrowd"] = 1
                num_outside += 1
        dataset.append(
            {
                "file_name": str(files[image_id]),
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": boxes,
            }
        )
    if num_outside:
        logger.warning(
            "%s: %d persons have no area inside their image; they are treated as ignored",
            odgt_file,
            num_outside,
        )
    return dataset


def _describe(name: str) -> Metadata:
    return MetadataCatalog.get(name).set(evaluator_type="crowdhuman", thing_classes=["person"])


def register_crowdhuman(name: str, odgt_file: StrPath, image_root: StrPath) -> None:
    """Registers own data in CrowdHuman's format; nothing is read before it is used.

    Args:
        name: for DATASETS.TRAIN or DATASETS.TEST.
        odgt_file: the annotations.
        image_root: folder with {ID}.jpg for each of them.
    """
    DatasetCatalog.register(name, functools.partial(load_crowdhuman, odgt_file, image_root))
    _describe(name).set(odgt_file=str(odgt_file), image_root=str(image_root))


def _load_official(odgt_file: Path, image_root: Path) -> list[dict[str, Any]]:
    if not odgt_file.is_file():
        raise FileNotFoundError(
            f"no CrowdHuman at {odgt_file}; expected annotation_train.odgt, annotation_val.odgt "
            "and Images/ in the folder crowdhuman of $DETECTRON2_DATASETS (default: ./datasets): "
            "download them from crowdhuman.org and set DETECTRON2_DATASETS before the start"
        )
    return load_crowdhuman(odgt_file, image_root)


def _load_tiny(root: Path, split: str) -> list[dict[str, Any]]:
    odgt_file = root / "annotation.odgt"
    if not odgt_file.exists():
        num_images, seed = _TINY[split]
        try:
            make_synthetic_crowd(root, num_images=num_images, seed=seed)
        except FileExistsError:
            pass  # another process was faster, with the same images
    return load_crowdhuman(odgt_file, root / "Images")


def register_builtin_crowd() -> None:
    """Registers crowdhuman_{train,val} and the synthetic crowd_tiny_{train,val}, once.

    CrowdHuman is expected under `$DETECTRON2_DATASETS/crowdhuman`. The synthetic crowd is made on
    first use under the `cache_root` of now, as all generated sets are.
    """
    cache = cache_root() / _TINY_FOLDER
    root = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser() / "crowdhuman"
    for split in ("train", "val"):
        odgt_file, image_root = root / f"annotation_{split}.odgt", root / "Images"
        official, tiny = f"crowdhuman_{split}", f"crowd_tiny_{split}"
        # Each by itself: whoever registered one of them does not have the other.
        if official not in DatasetCatalog:
            load = functools.partial(_load_official, odgt_file, image_root)
            DatasetCatalog.register(official, load)
            _describe(official).set(odgt_file=str(odgt_file), image_root=str(image_root))
        if tiny not in DatasetCatalog:
            DatasetCatalog.register(tiny, functools.partial(_load_tiny, cache / split, split))
            _describe(tiny)
