"""The photographs of the checkout: what the folder holds, its split, and how it is made."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kd_det.data.aquarium import (
    BLOCKS,
    LARGE,
    MANY,
    few_and_large,
    make_aquarium,
    many_and_small,
    scale_box,
    short_side_size,
    split_of,
)
from kd_det.data.catalog import AQUARIUM, register_builtin

CLASSES = ["fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"]
BOXES = {
    "train": [2045, 571, 305, 218, 257, 59, 141],
    "val": [379, 31, 87, 8, 55, 28, 17],
    "test": [244, 92, 124, 58, 40, 29, 26],
}
NUM_IMAGES = {"train": 470, "val": 86, "test": 82}


def annotations(split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((AQUARIUM / "annotations" / f"{split}.json").read_text())
    return content


@pytest.mark.parametrize("split", list(BOXES))
class TestFolder:
    def test_every_photograph_is_whole_and_of_its_size(self, split: str) -> None:
        for image in annotations(split)["images"]:
            with Image.open(AQUARIUM / "images" / image["file_name"]) as photograph:
                photograph.load()
                assert photograph.size == (image["width"], image["height"])
                assert photograph.mode == "RGB"
                assert min(photograph.size) == 256
                assert not photograph.getexif()

    def test_boxes_lie_inside(self, split: str) -> None:
        content = annotations(split)
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            limits = sizes[annotation["image_id"]]
            assert x >= 0 and y >= 0 and min(width, height) > 1
            assert x + width <= limits[0] + 1e-9 and y + height <= limits[1] + 1e-9
            assert annotation["area"] == pytest.approx(width * height, abs=1e-3)

    def test_counts_are_those_of_the_readme(self, split: str) -> None:
        register_builtin()
        records = DatasetCatalog.get(f"aquarium_{split}")
        counts = Counter(a["category_id"] for record in records for a in record["annotations"])
        assert MetadataCatalog.get(f"aquarium_{split}").thing_classes == CLASSES
        assert len(records) == NUM_IMAGES[split]
        assert [counts[i] for i in range(7)] == BOXES[split]
        readme = (AQUARIUM / "README.md").read_text()
        column = list(BOXES).index(split) + 1
        rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if " | " in line]
        told = {row[0]: int(row[column].replace(",", "")) for row in rows if row[0] in CLASSES}
        assert list(told.values()) == BOXES[split]

    def test_photographs_are_in_the_part_of_their_block(self, split: str) -> None:
        assert {split_of(image["file_name"]) for image in annotations(split)["images"]} == {split}


def test_parts_are_disjoint_and_complete() -> None:
    names = [image["file_name"] for split in BOXES for image in annotations(split)["images"]]
    assert len(names) == len(set(names)) == 638
    assert set(names) == {path.name for path in (AQUARIUM / "images").iterdir()}
    assert not set(BLOCKS["val"]) & set(BLOCKS["test"])


@pytest.mark.parametrize("part", [*LARGE, *MANY])
def test_the_large_and_the_small_parts_are_taken_from_the_others(part: str) -> None:
    content = annotations(part)
    choose, splits = (few_and_large, LARGE) if part in LARGE else (many_and_small, MANY)
    assert content == choose([annotations(split) for split in splits[part]])
    counts = Counter(x["image_id"] for x in content["annotations"])
    assert sorted(counts) == [image["id"] for image in content["images"]]
    told = f"`aquarium_{part}` ({len(counts)} photographs, {sum(counts.values())} boxes)"
    assert told in " ".join((AQUARIUM / "README.md").read_text().split())


def boxes(image_id: int, *areas: float) -> list[dict[str, Any]]:
    return [{"id": i, "image_id": image_id, "area": area} for i, area in enumerate(areas)]


def content(*boxes_of: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": i, "width": 100, "height": 100} for i in range(len(boxes_of))]
    annotations = [box for boxes in boxes_of for box in boxes]
    return {"images": images, "annotations": annotations, "categories": ["fish"]}


def test_few_and_large() -> None:
    first = content(boxes(0, 10, 150, 9000), boxes(1, 10, 149.9, 149.9), boxes(2))
    second = content(boxes(0, *[5000] * 11), boxes(1, *[5000] * 10))
    out = few_and_large([first, second])
    assert [image["id"] for image in out["images"]] == [1, 2]
    assert [x["image_id"] for x in out["annotations"]] == [1] * 3 + [2] * 10
    assert [x["id"] for x in out["annotations"]] == list(range(1, 14))
    assert [x["area"] for x in out["annotations"]][:3] == [10, 150, 9000]


def test_many_and_small() -> None:
    part = content(boxes(0, *[99] * 6), boxes(1, *[99] * 5), boxes(2, *[100] * 6), boxes(3))
    assert [x["area"] for x in many_and_small([part])["annotations"]] == [99] * 6


def test_the_folder_is_small_and_says_whose_it_is() -> None:
    assert sum(path.stat().st_size for path in AQUARIUM.rglob("*") if path.is_file()) < 11.5e6
    text = (AQUARIUM / "LICENSE").read_text()
    for word in ("Roboflow", "creativecommons.org/licenses/by/4.0", "Changes:"):
        assert word in text


class TestScaling:
    def test_by_hand(self) -> None:
        assert short_side_size((480, 640)) == (256, 341)
        assert short_side_size((640, 360)) == (455, 256)
        # The long side shrinks by 341 / 640, the short one by 256 / 480.
        assert scale_box([48, 64, 240, 320], (480, 640), (256, 341)) == [25.6, 34.1, 128, 170.5]

    def test_outside_is_cut_off(self) -> None:
        assert scale_box([-10, 90, 30, 20], (100, 100), (50, 50)) == [0, 45, 10, 5]
        assert scale_box([100, 0, 5, 5], (100, 100), (50, 50)) is None

    @given(
        st.tuples(st.floats(-50, 700), st.floats(-50, 700), st.floats(3, 700), st.floats(3, 700)),
        st.sampled_from([(480, 640), (640, 480), (360, 640)]),
    )
    def test_the_result_is_inside(
        self, box: tuple[float, float, float, float], old: tuple[int, int]
    ) -> None:
        new = short_side_size(old)
        scaled = scale_box(box, old, new)
        if scaled is not None:
            x, y, width, height = scaled
            assert 0 <= x < x + width <= new[0] + 1e-9
            assert 0 <= y < y + height <= new[1] + 1e-9


def write_original(
    folder: Path, *, size: tuple[int, int] = (60, 120), turned: bool = False
) -> None:
    """One photograph of each part, annotated as `size`; `turned` stores them on their side."""
    folder.mkdir(parents=True)
    names = ["IMG_2301_jpeg_jpg.rf.0a1b.jpg", "IMG_2380_jpg.jpg", "IMG_2290_jpg.jpg"]
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    for name in names:
        stored = Image.new("RGB", (120, 60) if turned else (60, 120), (10, 90, 200))
        stored.save(folder / name, exif=exif if turned else Image.Exif())
    box = {"category_id": 1, "bbox": [6, 12, 30, 24], "area": 720, "iscrowd": 0}
    content = {
        "images": [
            {"id": i, "file_name": name, "width": size[0], "height": size[1]}
            for i, name in enumerate(names)
        ],
        "annotations": [{"id": i, "image_id": i, **box} for i in range(3)],
        "categories": [{"id": 0, "name": "creatures"}, {"id": 1, "name": "fish"}],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


class TestMaking:
    @pytest.mark.parametrize("turned", [False, True])
    def test_each_part_gets_its_photograph(self, tmp_path: Path, turned: bool) -> None:
        write_original(tmp_path / "in" / "train", turned=turned)
        make_aquarium(tmp_path / "in", tmp_path / "out")
        names = ["IMG_2290_jpg.jpg", "IMG_2380_jpg.jpg", "IMG_2301_jpeg_jpg.jpg"]
        for split, name in zip(("train", "val", "test"), names, strict=True):
            content = json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
            assert content["categories"] == [{"id": 1, "name": "fish"}]
            assert content["images"] == [{"id": 1, "file_name": name, "width": 256, "height": 512}]
            (annotation,) = content["annotations"]
            assert annotation["bbox"] == [25.6, 51.2, 128, 102.4]
            with Image.open(tmp_path / "out" / "images" / name) as photograph:
                assert photograph.size == (256, 512)
                assert not photograph.getexif()

    def test_another_size_than_annotated_is_refused(self, tmp_path: Path) -> None:
        write_original(tmp_path / "in", size=(120, 60))
        with pytest.raises(ValueError, match=r"is \(60, 120\), but annotated as \(120, 60\)"):
            make_aquarium(tmp_path / "in", tmp_path / "out")

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"holds no \*.json"):
            make_aquarium(tmp_path, tmp_path / "out")
        write_original(tmp_path / "in")
        (tmp_path / "in" / "IMG_2380_jpg.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks IMG_2380_jpg.jpg, which a \*.json"):
            make_aquarium(tmp_path / "in", tmp_path / "out")

    def test_a_name_without_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"fish\.jpg has no camera number"):
            split_of("fish.jpg")
