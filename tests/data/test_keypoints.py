"""Keypoints of a user's own data: names, flips and bones from the annotation file."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.data import register_from_config
from kd_det.data.keypoints import flip_map, keypoint_metadata


def write(tmp_path: Path, categories: list[dict[str, Any]]) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"categories": categories}))
    return path


def test_names_flips_and_bones(tmp_path: Path) -> None:
    names = ["nose", "left_eye", "right_eye", "left"]
    category = {"name": "face", "keypoints": names, "skeleton": [[1, 2], [1, 3]]}
    found = keypoint_metadata(write(tmp_path, [{"name": "box"}, category]))
    assert found["keypoint_names"] == names
    assert found["keypoint_flip_map"] == [("left_eye", "right_eye")]
    assert [bone[:2] for bone in found["keypoint_connection_rules"]] == [
        ("nose", "left_eye"),
        ("nose", "right_eye"),
    ]


def test_flips() -> None:
    assert flip_map(["left", "right", "top", "leftover"]) == [("left", "right")]


def test_unnamed_keypoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no category names them; give one a "keypoints" list'):
        keypoint_metadata(write(tmp_path, [{"name": "box"}]))


def test_two_kinds_of_keypoints_are_refused(tmp_path: Path) -> None:
    categories = [{"name": n, "keypoints": [n, "left", "right"]} for n in ("cat", "dog")]
    with pytest.raises(ValueError, match="'cat' and 'dog' name different keypoints"):
        keypoint_metadata(write(tmp_path, categories))


def test_a_users_set_brings_them_when_it_is_loaded(tmp_path: Path) -> None:
    entry = tiny_runs.make_data(tmp_path / "own", name="own_keypoints", images=2)
    register_from_config([entry])
    DatasetCatalog.get("own_keypoints")
    metadata = MetadataCatalog.get("own_keypoints")
    assert metadata.keypoint_names == ["top", "left", "right"]
    assert metadata.keypoint_flip_map == [("left", "right")]
