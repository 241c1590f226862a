"""Broken annotation files: one clear error that names the file, or no harm."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from broken_annotations import (
    HEIGHT,
    WIDTH,
    Case,
    entries,
    files,
    valid,
    write_images,
    write_json,
)
from broken_numbers import numbers, shapes
from detectron2.config import get_cfg
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as coco_mask

from kd_det.data import CheckedDatasetMapper
from kd_det.data.annotation_file import read_class_names
from kd_det.data.coco_checks import check_coco
from kd_det.data.run_lengths import find_run_length_problem, unpack

CASES = [*files(), *entries(), *numbers(), *shapes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken")
    write_images(path)
    return path


@pytest.fixture(scope="module")
def mapper() -> CheckedDatasetMapper:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (WIDTH,)
    return CheckedDatasetMapper(cfg, is_train=True)


def check(folder: Path, case: Case) -> Path:
    path = folder / "truth.json"
    write_json(path, case)
    check_coco("mine", path, folder / "images", masks=case.masks, keypoints=case.keypoints)
    return path


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.message is not None], ids=lambda case: case.name
)
def test_refused_with_a_message_that_names_the_file(folder: Path, case: Case) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check(folder, case)
    message = str(error.value)
    assert message.startswith(f"data set 'mine' ({folder / 'truth.json'})")
    assert re.search(str(case.message), message.split(")", 1)[1], re.DOTALL), message
    assert len(message) < 700


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.message is None], ids=lambda case: case.name
)
def test_harmless(folder: Path, mapper: CheckedDatasetMapper, case: Case) -> None:
    path = check(folder, case)
    for record in load_coco_json(str(path), str(folder / "images")):
        assert mapper(record)["image"].shape[0] == 3


@pytest.mark.parametrize("needed", [{}, {"masks": True}, {"keypoints": True}])
def test_the_file_they_are_made_from_is_valid(folder: Path, needed: dict[str, bool]) -> None:
    check(folder, Case("valid", lambda content: None, **needed))


@pytest.mark.parametrize("case", [c for c in CASES if c.message], ids=lambda case: case.name)
def test_class_names_are_read_or_refused_by_file(folder: Path, case: Case) -> None:
    """Before any check, from a file of which nothing else is known."""
    path = folder / "truth.json"
    write_json(path, case)
    try:
        names = read_class_names(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert names == ["fox", "owl"]


def test_class_names_come_in_the_order_of_the_ids(folder: Path) -> None:
    content = valid()
    content["categories"] = [{"id": i, "name": f"c{i}"} for i in (10, 9, 2)]
    (folder / "ordered.json").write_text(json.dumps(content))
    assert read_class_names(folder / "ordered.json") == ["c2", "c9", "c10"]


class TestPackedRunLengths:
    @pytest.mark.parametrize("seed", range(20))
    def test_are_those_of_pycocotools(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = rng.random(rng.integers(1, 9, 2)) < rng.random()
        scale = rng.integers(1, 60, 2)
        mask = np.asfortranarray(np.kron(blocks, np.ones(scale)), dtype=np.uint8)
        text = coco_mask.encode(mask)["counts"].decode()
        runs = unpack(text)
        assert runs is not None
        values = np.arange(len(runs)) % 2
        np.testing.assert_array_equal(np.repeat(values, runs), mask.flatten("F"))
        height, width = mask.shape
        good = {"size": [height, width], "counts": text}
        assert find_run_length_problem(good, width, height) == ""

    def test_by_hand(self) -> None:
        """1, then 33 = 1 + 32, then 2, then -1 + 33."""
        assert unpack("1Q12O").tolist() == [1, 33, 2, 32]  # type: ignore[union-attr]

    def test_every_text_of_two_letters_is_unpacked_or_refused(self) -> None:
        letters = [chr(code) for code in range(32, 127)]
        for text in (a + b for a in letters for b in letters):
            find_run_length_problem({"size": [HEIGHT, WIDTH], "counts": text}, WIDTH, HEIGHT)
