"""Data sets by name: registration, laziness, and errors that say what is wrong with the data."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from PIL import Image

from kd_det.data.catalog import (
    AQUARIUM_PARTS,
    SHAPES,
    check_dataset,
    register_builtin,
    register_coco_style,
    register_from_config,
)
from kd_det.data.mapper import CheckedDatasetMapper
from kd_det.data.styles import V1, V2

BUILTIN = [*SHAPES, *(f"aquarium_{part}" for part in AQUARIUM_PARTS)]
Edit = Callable[[dict[str, Any]], object]


def forget(names: list[str]) -> None:
    for name in names:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The built-in data sets registered under a folder of this test."""
    forget(BUILTIN)
    with monkeypatch.context() as patch:
        patch.setenv("KD_DET_CACHE", str(tmp_path / "cache"))
        patch.setattr("kd_det.data.catalog.AQUARIUM", tmp_path / "aquarium256")
        register_builtin()
    yield tmp_path
    forget(BUILTIN)
    register_builtin()


@pytest.fixture
def mine() -> Iterator[str]:
    yield "mine"
    forget(["mine"])


def write_coco(folder: Path, edit: Edit = lambda content: None) -> tuple[Path, Path]:
    """Two images with one object each; `edit` changes the annotation file's content."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 16} for i in range(2)],
        "annotations": [
            {
                "id": 10 + i,
                "image_id": i,
                "category_id": 4 + i,
                "bbox": [1, 2, 8, 9],
                "area": 72,
                "iscrowd": 0,
            }
            for i in range(2)
        ],
        "categories": [{"id": 4, "name": "fox"}, {"id": 5, "name": "owl"}],
    }
    for i in range(2):
        Image.fromarray(np.full((16, 20, 3), 100 + i, np.uint8)).save(images / f"{i}.png")
    edit(content)
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json", images


class TestShapes:
    def test_nothing_is_drawn_before_it_is_asked_for(self, builtin: Path) -> None:
        register_builtin()
        metadata = MetadataCatalog.get("shapes_tiny_train")
        assert metadata.thing_classes == list(V1.classes)
        assert metadata.evaluator_type == "coco"
        assert not (builtin / "cache").exists()
        records = get_detection_dataset_dicts(["shapes_tiny_train"], filter_empty=False)
        assert len(records) == 16
        assert Path(metadata.json_file).is_relative_to(builtin / "cache")
        assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(8))
        assert all(Path(r["file_name"]).is_file() for r in records)

    def test_the_second_version_has_its_own_classes_and_place(self, builtin: Path) -> None:
        first, second = (MetadataCatalog.get(f"{name}_val") for name in ("shapes", "shapes2"))
        assert second.thing_classes == list(V2.classes) != list(V1.classes)
        assert Path(first.json_file).parts[-3:-1] == ("shapes-v1", "val-400x128px-0")
        assert Path(second.json_file).parts[-3:-1] == ("shapes-v2", "val-400x96px-0")

    def test_flipped_keypoints_swap_left_and_right(self, builtin: Path) -> None:
        indices = create_keypoint_hflip_indices(["shapes_tiny_val", "shapes_tiny_train"])
        assert list(indices) == [0, 3, 2, 1]  # top, right, bottom, left

    @pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
    def test_records_become_masks_and_keypoints(self, builtin: Path, mask_format: str) -> None:
        cfg = get_cfg()
        cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
        cfg.INPUT.MASK_FORMAT = mask_format
        cfg.INPUT.MIN_SIZE_TRAIN = (96,)
        cfg.DATASETS.TRAIN = ("shapes_tiny_val",)
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        for record in DatasetCatalog.get("shapes_tiny_val"):
            instances = mapper(record)["instances"]
            assert len(instances) == len(record["annotations"])
            assert instances.gt_keypoints.tensor.shape == (len(instances), 4, 3)
            tight = instances.gt_masks.get_bounding_boxes().tensor
            assert (tight - instances.gt_boxes.tensor).abs().max() < 2


class TestAquarium:
    def test_absence_says_where_it_comes_from(self, builtin: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"val\.json, which comes with a checkout"):
            DatasetCatalog.get("aquarium_val")

    def test_it_loads_from_the_folder(self, builtin: Path) -> None:
        root = builtin / "aquarium256"
        json_file, _ = write_coco(root)
        (root / "annotations").mkdir()
        json_file.rename(root / "annotations" / "val.json")
        assert len(DatasetCatalog.get("aquarium_val")) == 2
        assert MetadataCatalog.get("aquarium_val").thing_classes == ["fox", "owl"]


class TestRegisterFromConfig:
    def test_paths_are_relative_to_the_config(self, tmp_path: Path, mine: str) -> None:
        write_coco(tmp_path)
        entry = {"name": mine, "json": "truth.json", "images": "images"}
        register_from_config([entry], base_dir=tmp_path)
        register_from_config([entry], base_dir=tmp_path)  # the same again is fine
        records = DatasetCatalog.get(mine)
        assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]
        assert MetadataCatalog.get(mine).thing_classes == ["fox", "owl"]
        check_dataset(mine)

    def test_home_variables_and_the_working_directory(
        self, tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_coco(tmp_path / "here")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("PLACE", "here")
        monkeypatch.chdir(tmp_path)
        entry = {"name": mine, "json": "~/$PLACE/truth.json", "images": "here/images"}
        register_from_config([entry], base_dir="configs")
        assert len(DatasetCatalog.get(mine)) == 2

    def test_another_data_set_of_the_same_name_is_refused(self, tmp_path: Path, mine: str) -> None:
        for folder in ("a", "b"):
            write_coco(tmp_path / folder)
        entries = [
            {"name": mine, "json": f"{folder}/truth.json", "images": "a/images"}
            for folder in ("a", "b")
        ]
        with pytest.raises(ValueError, match=r"'mine' is registered already .*a/truth.json.*b/tru"):
            register_from_config(entries, base_dir=tmp_path)

    @pytest.mark.parametrize(
        "entry",
        [{"name": "x", "json": "y"}, {"name": "x", "json": "y", "images": "z", "jason": 1}, "x"],
    )
    def test_wrong_keys_are_named(self, entry: Any) -> None:
        with pytest.raises(ValueError, match=r"KD.DATASETS\[0\] has .* the keys \['name', 'json'"):
            register_from_config([entry])

    def test_a_missing_file_is_named_with_both_places(self, tmp_path: Path) -> None:
        entry = {"name": "x", "json": "nowhere.json", "images": "."}
        expected = rf"\[0\].json is 'nowhere.json', but there is no {tmp_path}/nowhere.json nor "
        with pytest.raises(FileNotFoundError, match=expected):
            register_from_config([entry], base_dir=tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(images=[]), "'mine' .* is empty: it lists no images"),
        (lambda c: c.update(categories=[]), "lists no categories"),
        (
            lambda c: c["annotations"][1].update(category_id=7),
            r"annotation 11 has category_id 7; the file's categories are \[4, 5\]",
        ),
        (lambda c: c["annotations"][0].update(image_id=9), "annotation 10 has image_id 9, which"),
        (lambda c: c["annotations"][0].update(id=11), "two entries have the annotation id 11"),
        (lambda c: c["annotations"][0].pop("area"), r"annotation 10 lacks \['area'\]"),
        (lambda c: c["images"][0].pop("width"), r"image 0 lacks \['width'\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), r"bbox \[1, 2, -3, 4\]; expec"),
        (lambda c: c["images"][0].update(file_name="no.png"), r"1 of 2 images .* first is no.png"),
    ],
)
def test_broken_data_is_refused_when_loaded(
    tmp_path: Path, mine: str, edit: Edit, message: str
) -> None:
    register_coco_style(mine, *write_coco(tmp_path, edit))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DatasetCatalog.get(mine)


def test_a_file_that_is_no_json_or_not_there(tmp_path: Path, mine: str) -> None:
    json_file, images = write_coco(tmp_path)
    register_coco_style(mine, json_file, images)
    json_file.write_text("{")
    with pytest.raises(ValueError, match=r"truth.json\) is not a JSON file"):
        DatasetCatalog.get(mine)
    json_file.unlink()
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        check_dataset(mine)


def test_a_test_set_without_annotations_loads(tmp_path: Path, mine: str) -> None:
    register_coco_style(mine, *write_coco(tmp_path, lambda content: content.pop("annotations")))
    assert len(DatasetCatalog.get(mine)) == 2


class TestCheckedDatasetMapper:
    @pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
    @pytest.mark.parametrize("is_train", [True, False])
    def test_a_broken_image_names_file_and_data_set(
        self, tmp_path: Path, mine: str, damage: str, is_train: bool
    ) -> None:
        json_file, images = write_coco(tmp_path)
        register_coco_style(mine, json_file, images)
        records = DatasetCatalog.get(mine)
        file = images / "1.png"
        content = {"truncated": file.read_bytes()[:40], "text": b"not an image"}
        file.unlink()
        if damage in content:
            file.write_bytes(content[damage])
        mapper = CheckedDatasetMapper(get_cfg(), is_train=is_train)
        assert mapper(records[0])["image"].shape[0] == 3
        with pytest.raises(RuntimeError, match=r"cannot read .*1.png of data set mine: "):
            mapper(records[1])

    def test_a_good_image_is_mapped_as_by_detectron2(self, tmp_path: Path, mine: str) -> None:
        json_file, images = write_coco(tmp_path)
        register_coco_style(mine, json_file, images)
        record = DatasetCatalog.get(mine)[1]
        mapped = CheckedDatasetMapper(get_cfg(), is_train=False)(record)
        assert mapped["image"].float().mean() == 101
        assert mapped["image_id"] == 1
