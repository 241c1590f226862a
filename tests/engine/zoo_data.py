"""Tiny sets in the formats that Detectron2's own configs train on, registered as it does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_runs
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated, register_pascal_voc
from detectron2.data.datasets.cityscapes import (
    load_cityscapes_instances,
    load_cityscapes_semantic,
)
from detectron2.data.datasets.lvis import load_lvis_json
from PIL import Image, ImageDraw

_CLASSES = ("a", "b")
_GROUND = 3  # category id of the one class of stuff


def coco(folder: Path) -> str:
    """Boxes, polygons and keypoints."""
    entry = tiny_runs.make_data(folder, name=folder.name)
    tiny_runs.register_from_config([entry])
    return entry["name"]


def panoptic(folder: Path) -> str:
    """Things, and the ground around them as stuff; needs nothing to be loaded."""
    return f"{_panoptic(folder)}_separated"


def semantic(folder: Path) -> str:
    """The same without its instances."""
    return f"{_panoptic(folder)}_stuffonly"


def _panoptic(folder: Path) -> str:
    content = _as_jpeg(folder)
    roots = {name: folder / name for name in ("semantic", "panoptic")}
    for root in roots.values():
        root.mkdir()
    entries = []
    for record in content["images"]:
        segments = np.full((record["height"], record["width"]), 1, dtype=np.uint8)
        infos = [{"id": 1, "category_id": _GROUND, "iscrowd": 0}]
        for number, item in enumerate(_objects(content, record), start=2):
            x, y, w, h = item["bbox"]
            segments[y : y + h, x : x + w] = number
            infos.append({"id": number, "category_id": item["category_id"], "iscrowd": 0})
        shown = [info for info in infos if (segments == info["id"]).any()]
        for info in shown:
            info["area"] = int((segments == info["id"]).sum())
            info["bbox"] = [0, 0, 1, 1]
        file = f"{Path(record['file_name']).stem}.png"
        Image.fromarray((segments == 1).astype(np.uint8)).save(roots["semantic"] / file)
        coded = np.stack([segments, 0 * segments, 0 * segments], axis=2)
        Image.fromarray(coded).save(roots["panoptic"] / file)
        entries.append({"image_id": record["id"], "file_name": file, "segments_info": shown})
    categories = [
        {"id": i, "name": n, "isthing": int(i != _GROUND)}
        for i, n in ((1, "a"), (2, "b"), (_GROUND, "ground"))
    ]
    path = folder / "panoptic.json"
    path.write_text(json.dumps({**content, "annotations": entries, "categories": categories}))
    register_coco_panoptic_separated(
        folder.name,
        {
            "thing_classes": list(_CLASSES),
            "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
            "stuff_classes": ["things", "ground"],
            "stuff_dataset_id_to_contiguous_id": {0: 0, _GROUND: 1},
        },
        str(folder / "images"),
        str(roots["panoptic"]),
        str(path),
        str(roots["semantic"]),
        str(folder / "data.json"),
    )
    return folder.name


def lvis(folder: Path) -> str:
    """LVIS's file; the package lvis reads it."""
    content = _as_jpeg(folder)
    for record in content["images"]:
        record["coco_url"] = f"http://host/images/{record['file_name']}"
        record.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    for category in content["categories"]:
        category.update(frequency="f", image_count=len(content["images"]))
    path = folder / "lvis.json"
    path.write_text(json.dumps(content))
    load = lambda: load_lvis_json(str(path), f"{folder}/")  # noqa: E731
    return register(folder.name, load, "lvis", json_file=str(path), thing_classes=[*_CLASSES])


def voc(folder: Path) -> str:
    """Pascal VOC's folders."""
    content = _as_jpeg(folder)
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "images").rename(folder / "JPEGImages")
    for record in content["images"]:
        objects = "".join(
            f"<object><name>{_CLASSES[item['category_id'] - 1]}</name><pose>Left</pose>"
            + "<truncated>0</truncated><difficult>0</difficult>"
            + "<bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in _corners(item["bbox"]).items())
            + "</bndbox></object>"
            for item in _objects(content, record)
        )
        size = f"<size><width>{record['width']}</width><height>{record['height']}</height></size>"
        file = folder / "Annotations" / f"{Path(record['file_name']).stem}.xml"
        file.write_text(f"<annotation>{size}{objects}</annotation>")
    names = [Path(record["file_name"]).stem for record in content["images"]]
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names))
    register_pascal_voc(folder.name, str(folder), "train", 2007, _CLASSES)
    MetadataCatalog.get(folder.name).evaluator_type = "pascal_voc"
    return folder.name


def cityscapes(folder: Path) -> str:
    """Cityscapes' instances, cars on a road; the package cityscapesscripts reads its labels."""
    images, truth = _cityscapes(folder)
    load = lambda: load_cityscapes_instances(  # noqa: E731
        images, truth, from_json=False, to_polygons=False
    )
    classes = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    return register(folder.name, load, "cityscapes_instance", gt_dir=truth, thing_classes=classes)


def cityscapes_semantic(folder: Path) -> str:
    """Cityscapes' semantic labels."""
    images, truth = _cityscapes(folder)
    load = lambda: load_cityscapes_semantic(images, truth)  # noqa: E731
    return register(
        folder.name,
        load,
        "cityscapes_sem_seg",
        gt_dir=truth,
        ignore_label=255,
        stuff_classes=[str(i) for i in range(19)],
    )


def _cityscapes(folder: Path) -> tuple[str, str]:
    images, truth = folder / "leftImg8bit" / "town", folder / "gtFine" / "town"
    for place in (images, truth):
        place.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(4):
        canvas = Image.fromarray(rng.integers(0, 60, (64, 96, 3), dtype=np.uint8))
        maps = {
            "instanceIds": Image.new("I;16", (96, 64), 7),
            "labelIds": Image.new("L", (96, 64), 7),
            "labelTrainIds": Image.new("L", (96, 64), 0),
        }
        for k in range(2):
            box = (10 + 40 * k, 10 + 4 * i, 40 + 40 * k, 40 + 4 * i)
            ImageDraw.Draw(canvas).rectangle(box, fill=(200, 90, 40))
            for (_, image), value in zip(maps.items(), (26000 + k, 26, 13), strict=True):
                ImageDraw.Draw(image).rectangle(box, fill=value)
        canvas.save(images / f"town_{i}_0_leftImg8bit.png")
        for name, image in maps.items():
            image.save(truth / f"town_{i}_0_gtFine_{name}.png")
        size = {"imgHeight": 64, "imgWidth": 96, "objects": []}
        (truth / f"town_{i}_0_gtFine_polygons.json").write_text(json.dumps(size))
    return str(images.parent), str(truth.parent)


def register(
    name: str, load: Callable[[], list[dict[str, Any]]], evaluator_type: str, **metadata: Any
) -> str:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type=evaluator_type, **metadata)
    return name


def _as_jpeg(folder: Path) -> dict[str, Any]:
    """Make the tiny COCO set with JPEG files, and without keypoints; return its content."""
    tiny_runs.make_data(folder)
    content: dict[str, Any] = json.loads((folder / "data.json").read_text())
    for record in content["images"]:
        source = folder / "images" / record["file_name"]
        record["file_name"] = f"{source.stem}.jpg"
        Image.open(source).save(source.with_suffix(".jpg"), quality=95)
        source.unlink()
    for item in content["annotations"]:
        del item["keypoints"], item["num_keypoints"]
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(_CLASSES)]
    (folder / "data.json").write_text(json.dumps(content))
    return content


def _objects(content: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in content["annotations"] if item["image_id"] == record["id"]]


def _corners(box: list[int]) -> dict[str, int]:
    x, y, w, h = box
    return {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
