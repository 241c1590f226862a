"""All data of a config is checked before the first step."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_annotations import valid, write_images
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_det.data import coco_checks, register_coco_style, register_crowdhuman
from kd_det.data.dataset_checks import check_datasets, check_proposals
from kd_det.data.loading import load_training_set
from kd_det.engine.trainer import DistillationTrainer

NAMES = ("checked_train", "checked_test", "checked_crowd")


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    """Two valid sets in COCO format."""
    for name in NAMES[:2]:
        write_images(tmp_path / name)
        (tmp_path / name / "truth.json").write_text(json.dumps(valid()))
        register_coco_style(name, tmp_path / name / "truth.json", tmp_path / name / "images")
    out = get_cfg()
    out.DATASETS.TRAIN, out.DATASETS.TEST = NAMES[:1], NAMES[1:2]
    yield out
    for name in NAMES:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def spoil(folder: Path, name: str, key: str, value: object) -> None:
    content = valid()
    content["annotations"][0][key] = value
    (folder / name / "truth.json").write_text(json.dumps(content))


def test_valid_ones_pass(cfg: CfgNode) -> None:
    check_datasets(cfg)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    check_datasets(cfg)


def named_keypoints(folder: Path, **change: object) -> None:
    """Write the training set so that it can be loaded: its keypoints have names."""
    content = valid()
    count = max(len(item.get("keypoints", ())) for item in content["annotations"]) // 3
    for category in content["categories"]:
        category["keypoints"] = [str(i) for i in range(count)]
    content["annotations"][0].update(change)
    for name in NAMES[:2]:
        (folder / name / "truth.json").write_text(json.dumps(content))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sets that are checked from now on, in order."""
    names: list[str] = []
    original = coco_checks.check_coco

    def note(name: str, *rest: Any, **switches: bool) -> dict[str, Any]:
        names.append(name)
        return original(name, *rest, **switches)

    monkeypatch.setattr(coco_checks, "check_coco", note)
    return names


def test_a_run_checks_each_set_once(tmp_path: Path, cfg: CfgNode, checked: list[str]) -> None:
    named_keypoints(tmp_path)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.MASK_ON = True
    check_datasets(cfg)
    assert checked == list(NAMES[:2])
    load_training_set(cfg)
    DistillationTrainer.build_test_loader(cfg, NAMES[1])
    check_datasets(cfg)  # as a rehearsed teacher and its student do
    assert len(checked) == 2


def test_a_changed_set_and_more_switches_are_checked_again(
    tmp_path: Path, cfg: CfgNode, checked: list[str]
) -> None:
    named_keypoints(tmp_path)
    load_training_set(cfg)
    cfg.MODEL.KEYPOINT_ON = True
    check_datasets(cfg)
    assert checked == [NAMES[0], *NAMES[:2]]
    named_keypoints(tmp_path, category_id=99)
    with pytest.raises(ValueError, match="category_id 99"):
        load_training_set(cfg)
    named_keypoints(tmp_path)
    load_training_set(cfg)
    next((tmp_path / NAMES[0] / "images").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images are missing"):
        load_training_set(cfg)


@pytest.mark.parametrize("name", NAMES[:2])
def test_training_and_test_sets_are_checked(tmp_path: Path, cfg: CfgNode, name: str) -> None:
    spoil(tmp_path, name, "category_id", "4")
    with pytest.raises(ValueError, match=rf"data set '{name}' .*annotation 10 has category_id '4'"):
        check_datasets(cfg)


@pytest.mark.parametrize("on", [True, False])
def test_masks_are_needed_by_models_of_masks_alone(tmp_path: Path, cfg: CfgNode, on: bool) -> None:
    spoil(tmp_path, NAMES[1], "segmentation", None)
    cfg.MODEL.MASK_ON = on
    if not on:
        check_datasets(cfg)
        return
    with pytest.raises(ValueError, match=r"annotation 10 has segmentation None, but the model is"):
        check_datasets(cfg)


def test_an_unknown_name(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("nowhere",)
    with pytest.raises(KeyError, match=r"'nowhere' is not registered; the nearest valid names are"):
        check_datasets(cfg)


@pytest.mark.parametrize(("role", "name"), [("TRAIN", NAMES[0]), ("TEST", NAMES[1])])
def test_an_image_that_would_be_resized_to_nothing(
    tmp_path: Path, cfg: CfgNode, role: str, name: str
) -> None:
    """4000 x 1 at 1333 pixels for the longer side: a third of a pixel high."""
    content = valid()
    content["images"][1].update(width=4000, height=1)
    content["annotations"].pop(1)
    (tmp_path / name / "truth.json").write_text(json.dumps(content))
    message = rf"'{name}': 1.png of 4000 x 1 pixels .* becomes 1333 x 0 when INPUT.MIN_SIZE_{role}"
    with pytest.raises(ValueError, match=message):
        check_datasets(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (0,), 0
    check_datasets(cfg)


def test_crowdhuman(tmp_path: Path, cfg: CfgNode) -> None:
    (tmp_path / "a.jpg").parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    record = {"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 1, 1e9, 5]}]}
    (tmp_path / "a.odgt").write_text(json.dumps(record))
    register_crowdhuman(NAMES[2], tmp_path / "a.odgt", tmp_path)
    cfg.DATASETS.TEST = (NAMES[2],)
    with pytest.raises(ValueError, match=r"a.odgt, line 1, box 0"):
        check_datasets(cfg)


class TestProposals:
    """Precomputed proposals are pickles, which Detectron2 reads by Python's own unpickler."""

    @pytest.fixture
    def canary(self, tmp_path: Path) -> Path:
        return tmp_path / "canary"

    @pytest.fixture
    def hostile(self, tmp_path: Path, cfg: CfgNode, canary: Path) -> CfgNode:
        class Call:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return exec, (f"open({str(canary)!r}, 'w').close()",)

        (tmp_path / "proposals.pkl").write_bytes(pickle.dumps({"ids": [0], "boxes": Call()}))
        cfg.MODEL.LOAD_PROPOSALS = True
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(tmp_path / "proposals.pkl"),)
        cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "proposals.pkl"),)
        return cfg

    def test_are_refused_and_not_run(self, hostile: CfgNode, canary: Path) -> None:
        for check in (check_proposals, check_datasets):
            with pytest.raises(ValueError, match=r"proposals.pkl asks for builtins.exec"):
                check(hostile)
        assert not canary.exists()

    def test_are_refused_by_the_loaders(self, hostile: CfgNode, canary: Path) -> None:
        with pytest.raises(ValueError, match=r"proposals.pkl asks for builtins.exec"):
            DistillationTrainer.build_test_loader(hostile, NAMES[1])
        with pytest.raises(ValueError, match=r"proposals.pkl asks for builtins.exec"):
            empty = DistillationTrainer.__new__(DistillationTrainer)
            empty._build_train_loader(hostile, None)  # type: ignore[arg-type]
        assert not canary.exists()

    def test_benign_ones_are_read(self, tmp_path: Path, cfg: CfgNode) -> None:
        content = {"ids": [0, 1, 2], "boxes": [np.ones((2, 4), "f4")] * 3, "bbox_mode": 0}
        (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(content))
        cfg.MODEL.LOAD_PROPOSALS = True
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(tmp_path / "proposals.pkl"),)
        check_proposals(cfg)
