"""
The built-in synthetic detection sets: drawn shapes on cluttered, noisy backgrounds.

They are made on this machine at first use, in seconds, so that everything runs without a download.
Objects differ in size, overlap, leave the image, and stand among strokes and blobs that are no
objects. Every object has a box of its full extent, hidden parts included, clipped to the image; a
polygon of the same extent; and four keypoints, its outermost points. There are two versions
(`styles`): the first has eight classes and is hard for small nets; the second has six upright ones
and can be learnt in minutes.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from iopath.common.file_io import file_lock
from tqdm import tqdm

from kd_det.data.drawing import polygon_area
from kd_det.data.scene import DrawnObject, compose
from kd_det.data.styles import V1, Style

KEYPOINTS = ("top", "right", "bottom", "left")
KEYPOINT_FLIP_MAP = (("left", "right"),)
_SKELETON = ((1, 2), (2, 3), (3, 4), (4, 1))  # COCO counts keypoints from 1


def shapes_json(
    root: Path, *, split: str, num_images: int, size: int = 128, seed: int = 0, style: Style = V1
) -> Path:
    """Return where `make_shapes` with the same arguments writes its annotation file."""
    folder = root / f"shapes-v{style.version}" / f"{split}-{num_images}x{size}px-{seed}"
    return folder / "annotations.json"


def make_shapes(
    root: Path, *, split: str, num_images: int, size: int = 128, seed: int = 0, style: Style = V1
) -> Path:
    """
    Make the set, unless it is there already.

    Image number i depends on version, seed, split, size and i alone, so a set of fewer images is
    the beginning of a larger one. Processes that ask at the same time wait for the first; a crash
    leaves no half set.

    Args:
        root: folder to make it in; `shapes_json` names the place below.
        split: name that sets the images apart from those of other splits, such as "train".
        num_images: how many.
        size: mean side of the images in pixels; each side is drawn from 0.75 to 1.25 times this.
        seed: for another set of the same kind.
        style: the version of the set: its classes, sizes and difficulty.

    Returns:
        Path of the annotation file in COCO format; the images are in `images/` beside it.
    """
    json_file = shapes_json(
        root, split=split, num_images=num_images, size=size, seed=seed, style=style
    )
    folder = json_file.parent
    if json_file.is_file():
        return json_file
    with file_lock(str(folder)):
        if not json_file.is_file():
            scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
            scratch.mkdir()
            try:
                _write(
                    scratch, split=split, num_images=num_images, size=size, seed=seed, style=style
                )
                os.replace(scratch, folder)
            except OSError:
                # Where locks do not hold (some network file systems), another process may be first.
                if not json_file.is_file():
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return json_file


def _write(
    folder: Path, *, split: str, num_images: int, size: int, seed: int, style: Style
) -> None:
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers = range(num_images)
    for number in tqdm(numbers, f"drawing shapes ({split})", unit="image", delay=2):
        rng = np.random.default_rng([style.version, seed, size, number, *split.encode()])
        width, height = (int(v) for v in np.round(rng.uniform(0.75, 1.25, 2) * size))
        scene = compose(width, height, rng, style)
        name = f"{number:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        pixels = scene.finish().astype(np.uint8)
        if not cv2.imwrite(str(folder / "images" / name), pixels, quality):
            raise OSError(f"cannot write {name} into {folder / 'images'}; is the disk full?")
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for index, item in enumerate(scene.objects):
            entry = _annotation(item, index, scene.owner)
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **entry})
    shared = {"keypoints": list(KEYPOINTS), "skeleton": [list(bone) for bone in _SKELETON]}
    categories = [
        {"id": i, "name": name, **shared} for i, name in enumerate(style.classes, start=1)
    ]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))


def _keypoints(item: DrawnObject, index: int, owner: Any) -> list[float]:
    """Return x, y, visibility of the outermost points; COCO's visibility 0, 1 or 2."""
    height, width = owner.shape
    out: list[float] = []
    x, y = item.outline.T
    for corner in (np.argmin(y), np.argmax(x), np.argmax(y), np.argmin(x)):
        px, py = item.outline[corner]
        if not (0 <= px < width and 0 <= py < height):
            out += [0, 0, 0]
            continue
        # Later objects lie on top. COCO's keypoints are pixel indices: their centre is 0.5 further.
        visibility = 1 if owner[int(py), int(px)] > index else 2
        px, py = np.clip((px - 0.5, py - 0.5), 0, (width - 1, height - 1))
        out += [round(float(px), 2), round(float(py), 2), visibility]
    return out


def _annotation(item: DrawnObject, index: int, owner: Any) -> dict[str, Any]:
    low, high = item.clipped.min(0), item.clipped.max(0)
    keypoints = _keypoints(item, index, owner)
    return {
        "category_id": item.category + 1,
        "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        "area": round(polygon_area(item.clipped), 2),
        "iscrowd": 0,
        "segmentation": [[round(float(v), 2) for v in item.clipped.ravel()]],
        "keypoints": keypoints,
        "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
    }
