"""
Data sets by name: the built-in ones, and the user's own in COCO format.

Names go into Detectron2's DatasetCatalog, so DATASETS.TRAIN and DATASETS.TEST take them as they
take "coco_2017_train", which Detectron2 registers itself. Nothing is read or drawn before a data
set is first asked for; then it is checked as a whole: a broken file stops a run at its start.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from kd_det.data.coco_checks import check_coco, checked_coco
from kd_det.data.keypoints import keypoint_metadata
from kd_det.data.shapes import KEYPOINT_FLIP_MAP, KEYPOINTS, make_shapes, shapes_json
from kd_det.data.styles import V1, V2, Style
from kd_det.files import cache_root

StrPath = str | os.PathLike[str]

# Name: version, split and number of images. Splits share no image.
SHAPES: dict[str, tuple[Style, str, int]] = {
    "shapes_train": (V1, "train", 2000),
    "shapes_val": (V1, "val", 400),
    "shapes_tiny_train": (V1, "tiny_train", 16),
    "shapes_tiny_val": (V1, "tiny_val", 8),
    "shapes2_train": (V2, "train", 2000),
    "shapes2_val": (V2, "val", 400),
    "shapes2_test": (V2, "test", 600),
}
# Photographs for training, for choosing, and for reporting: see datasets/aquarium256/README.md.
AQUARIUM = Path(__file__).resolve().parents[2] / "datasets" / "aquarium256"
AQUARIUM_PARTS = ("train", "val", "test", "large_train", "large_test", "many_train", "many_test")
_KEYS = ("name", "json", "images")
_BONE_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167))


def register_builtin() -> None:
    """
    Register the built-in sets: SHAPES, and of the aquarium photographs AQUARIUM_PARTS.

    Safe to call again. The shapes are drawn when they are first asked for, under the `cache_root`
    of now; the aquarium photographs are those of the checkout that this file is in.
    """
    for name, (style, split, num_images) in SHAPES.items():
        if name not in DatasetCatalog:
            _register_shapes(name, style=style, split=split, num_images=num_images)
    for split in AQUARIUM_PARTS:
        if f"aquarium_{split}" not in DatasetCatalog:
            _register_aquarium(f"aquarium_{split}", split)


def register_coco_style(name: str, json: StrPath, images: StrPath) -> None:
    """
    Register a data set in COCO format. Nothing is read before it is first asked for.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        json: annotation file.
        images: folder that the file names in it are relative to.

    Raises:
        ValueError: the name is taken by a data set at other paths.
    """
    paths = {"json_file": os.fspath(json), "image_root": os.fspath(images)}
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        taken = {key: metadata.get(key) for key in paths}
        if taken != paths:
            raise ValueError(
                f"data set {name!r} is registered already with {taken}, and cannot be registered "
                f"again with {paths}; choose another name"
            )
        return
    _register(name, paths, lambda: _load(name))


def register_from_config(
    datasets: Sequence[Mapping[str, Any]], *, base_dir: StrPath | None = None
) -> None:
    """
    Register the data sets that a config lists under KD.DATASETS.

    Args:
        datasets: one mapping each, with "name", "json" and "images". Paths may hold ~ and
            environment variables.
        base_dir: what relative paths are relative to, the config's folder; where a path does not
            exist there, it is taken from the working directory.

    Raises:
        ValueError: a key is missing or unknown, or a name is taken by a data set at other paths.
        FileNotFoundError: a path does not exist.
    """
    for position, entry in enumerate(datasets):
        where = f"KD.DATASETS[{position}]"
        if not isinstance(entry, Mapping) or set(entry) != set(_KEYS):
            found = sorted(entry) if isinstance(entry, Mapping) else repr(entry)
            raise ValueError(f"{where} has {found}; expected exactly the keys {list(_KEYS)}")
        paths = [_find(entry[key], base_dir, f"{where}.{key}") for key in ("json", "images")]
        register_coco_style(str(entry["name"]), paths[0], paths[1])


def check_dataset(name: str) -> None:
    """
    Check a registered data set in COCO format as loading it would, without loading it.

    Raises:
        ValueError: something in the annotation file is not usable; see `check_coco`.
        FileNotFoundError: the annotation file or an image is missing.
    """
    metadata = MetadataCatalog.get(name)
    check_coco(name, Path(metadata.json_file), Path(metadata.image_root))


def _find(path: Any, base_dir: StrPath | None, where: str) -> str:
    expanded = Path(os.path.expandvars(os.path.expanduser(os.fspath(path))))
    tried = [Path(base_dir or ".") / expanded, expanded]
    for candidate in tried:
        if candidate.exists():
            return str(candidate.resolve())
    places = " nor ".join(dict.fromkeys(str(candidate.absolute()) for candidate in tried))
    raise FileNotFoundError(f"{where} is {str(path)!r}, but there is no {places}")


def _register(
    name: str, metadata: Mapping[str, Any], load: Callable[[], list[dict[str, Any]]]
) -> None:
    DatasetCatalog.register(name, load)
    entry = MetadataCatalog.get(name)
    for key, value in {**metadata, "evaluator_type": "coco"}.items():
        setattr(entry, key, value)


def _load(name: str) -> list[dict[str, Any]]:
    metadata = MetadataCatalog.get(name)
    checked_coco(name, Path(metadata.json_file), Path(metadata.image_root))
    records: list[dict[str, Any]] = load_coco_json(metadata.json_file, metadata.image_root, name)
    annotated = any("keypoints" in item for record in records for item in record["annotations"])
    if annotated and metadata.get("keypoint_names") is None:
        metadata.set(**keypoint_metadata(Path(metadata.json_file)))
    return records


def _register_shapes(name: str, *, style: Style, split: str, num_images: int) -> None:
    root = cache_root()
    size = style.size
    json_file = shapes_json(root, split=split, num_images=num_images, size=size, style=style)

    def load() -> list[dict[str, Any]]:
        make_shapes(root, split=split, num_images=num_images, size=size, style=style)
        return _load(name)

    # All known before the first image is drawn: an evaluator or a mapper may be built before that.
    bones = [(*KEYPOINTS[i : i + 2], _BONE_COLOURS[i]) for i in range(3)]
    metadata = {
        "json_file": str(json_file),
        "image_root": str(json_file.parent / "images"),
        "thing_classes": list(style.classes),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(style.classes))},
        "keypoint_names": list(KEYPOINTS),
        "keypoint_flip_map": list(KEYPOINT_FLIP_MAP),
        "keypoint_connection_rules": [*bones, (KEYPOINTS[3], KEYPOINTS[0], _BONE_COLOURS[3])],
    }
    _register(name, metadata, load)


def _register_aquarium(name: str, split: str) -> None:
    json_file = AQUARIUM / "annotations" / f"{split}.json"

    def load() -> list[dict[str, Any]]:
        if not json_file.is_file():
            raise FileNotFoundError(
                f"data set {name!r} needs {json_file}, which comes with a checkout of kd_det and "
                "not with an installed package: run from a checkout (`pip install -e .`), or "
                "name its files in KD.DATASETS under another name"
            )
        return _load(name)

    _register(name, {"json_file": str(json_file), "image_root": str(AQUARIUM / "images")}, load)
