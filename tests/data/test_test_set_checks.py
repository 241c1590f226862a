"""A test set that does not fit its training set, or its own images, is found before the start."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_annotations import HEIGHT, WIDTH, valid, write_images
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_det.data import image_sizes, register_coco_style, register_crowdhuman
from kd_det.data.dataset_checks import check_datasets
from kd_det.data.mapper import CheckedDatasetMapper
from kd_det.data.test_set_checks import check_classes_tested, check_objects, check_test_files

TRAIN, TEST, CROWD = "fitting_train", "fitting_test", "fitting_crowd"
Content = dict[str, Any]


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    """Foxes and owls, in training and in the test."""
    for name in (TRAIN, TEST):
        write_images(tmp_path / name)
        rewrite(tmp_path / name, lambda _: None)
        register_coco_style(name, tmp_path / name / "truth.json", tmp_path / name / "images")
    out = get_cfg()
    out.DATASETS.TRAIN, out.DATASETS.TEST = (TRAIN,), (TEST,)
    yield out
    for name in (TRAIN, TEST, CROWD):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def rewrite(folder: Path, change: Callable[[Content], Any]) -> None:
    content = valid()
    change(content)
    (folder / "truth.json").write_text(json.dumps(content))


def named(*names: str) -> Callable[[Content], None]:
    """Other classes; ids run against the order of the file, and every object is of the first."""

    def change(content: Content) -> None:
        ids = range(20, 20 + len(names))
        classes = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        content["categories"] = classes[::-1]
        for annotation in content["annotations"]:
            annotation["category_id"] = 20

    return change


def check_classes(cfg: CfgNode, *, of_teacher: bool = False) -> None:
    check_classes_tested(cfg, check_datasets(cfg), of_teacher=of_teacher)


class TestClasses:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("owl",), rf"'{TEST}' has 1 classes, .*'{TRAIN}' has 2, and class 0 is 'fox' in"),
            (("fox",), r"class 1 is 'owl' in training and none in the test"),
            (("fox", "elk"), r"class 1 is 'owl' in training and 'elk' in the test: .*\"categories"),
            (("owl", "fox"), r"class 0 is 'fox' in training and 'owl' in the test"),
            (("fox", "owl", "elk"), r"class 2 is none in training and 'elk' in the test"),
        ],
    )
    def test_others_are_refused(
        self, tmp_path: Path, cfg: CfgNode, names: tuple[str, ...], message: str
    ) -> None:
        rewrite(tmp_path / TEST, named(*names))
        with pytest.raises(ValueError, match=message):
            check_classes(cfg)

    def test_the_same_under_other_ids_pass(self, tmp_path: Path, cfg: CfgNode) -> None:
        rewrite(tmp_path / TEST, named("fox", "owl"))
        check_classes(cfg)

    def test_one_class_under_two_names_is_told(
        self, tmp_path: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture
    ) -> None:
        rewrite(tmp_path / TRAIN, named("pedestrian"))
        rewrite(tmp_path / TEST, named("person"))
        check_classes(cfg)
        assert "class 0 is 'pedestrian' in training and 'person' in the test" in caplog.text

    def test_a_teacher_may_know_others_unless_it_could_not_be_evaluated(
        self, tmp_path: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture
    ) -> None:
        rewrite(tmp_path / TEST, named("fox", "elk"))
        check_classes(cfg, of_teacher=True)
        assert "class 1 is 'owl' in training and 'elk' in the test" in caplog.text
        rewrite(tmp_path / TEST, named("fox"))
        with pytest.raises(ValueError, match=r"class 1 is 'owl' in training and none in the test"):
            check_classes(cfg, of_teacher=True)

    def test_crowdhuman_has_people_alone(self, tmp_path: Path, cfg: CfgNode) -> None:
        crowd(tmp_path)
        cfg.DATASETS.TEST = (CROWD,)
        with pytest.raises(ValueError, match=r"class 0 is 'fox' in training and 'person' in"):
            check_classes(cfg)

    @pytest.mark.parametrize(("role", "kind"), [("TRAIN", None), ("TEST", "sem_seg")])
    def test_unknown_names_and_other_tasks_pass(self, cfg: CfgNode, role: str, kind: Any) -> None:
        """A loader of the user's own without metadata; a set evaluated by its pixels."""
        DatasetCatalog.register(CROWD, lambda: [{"file_name": "a.png"}])
        if kind:
            MetadataCatalog.get(CROWD).set(evaluator_type=kind, thing_classes=["sky"])
        cfg.DATASETS[role] = (CROWD,)
        check_classes(cfg)

    def test_the_first_set_with_names_counts(self, tmp_path: Path, cfg: CfgNode) -> None:
        DatasetCatalog.register(CROWD, lambda: [{"file_name": "a.png"}])
        cfg.DATASETS.TRAIN = (CROWD, TRAIN)
        check_classes(cfg)
        rewrite(tmp_path / TEST, named("owl"))
        with pytest.raises(ValueError, match=rf"DATASETS.TRAIN '{TRAIN}' has 2"):
            check_classes(cfg)

    def test_what_is_no_thing_of_a_panoptic_set_does_not_count(self, cfg: CfgNode) -> None:
        """Detectron2's COCO metadata: the standard set lists all 133, the things in front."""
        things = {"thing_classes": ["fox", "owl"]}
        stuff = {
            "thing_classes": ["fox", "owl", "sky"],
            "thing_dataset_id_to_contiguous_id": {4: 0, 5: 1},
            "evaluator_type": "coco_panoptic_seg",
        }
        MetadataCatalog.get(TRAIN).set(**things)
        DatasetCatalog.register(CROWD, lambda: [{"file_name": "a.png"}])
        MetadataCatalog.get(CROWD).set(**stuff)
        cfg.DATASETS.TEST = (CROWD,)
        check_classes(cfg)


def crowd(folder: Path, ignore: int = 0) -> None:
    Image.new("RGB", (40, 30)).save(folder / "a.jpg")
    box = {"tag": "person", "fbox": [1, 1, 9, 5], "extra": {"ignore": ignore}}
    (folder / "a.odgt").write_text(json.dumps({"ID": "a", "gtboxes": [box]}))
    register_crowdhuman(CROWD, folder / "a.odgt", folder)


class TestObjects:
    @pytest.mark.parametrize("kept", [[], [2]], ids=["none", "a crowd"])
    def test_none_at_all(self, tmp_path: Path, cfg: CfgNode, kept: list[int]) -> None:
        def change(content: Content) -> None:
            content["annotations"] = [content["annotations"][i] for i in kept]

        rewrite(tmp_path / TEST, change)
        message = rf"'{TEST}' has no annotated object beside crowds.*DATASETS.TEST"
        with pytest.raises(ValueError, match=message):
            check_objects(cfg, check_datasets(cfg))

    def test_images_to_predict_on_are_told(
        self, tmp_path: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture
    ) -> None:
        check_objects(cfg, check_datasets(cfg))
        assert not caplog.text
        rewrite(tmp_path / TEST, lambda content: content.pop("annotations"))
        check_objects(cfg, check_datasets(cfg))
        assert f"test set '{TEST}' has no annotated object" in caplog.text

    def test_of_another_format_is_told(
        self, tmp_path: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture
    ) -> None:
        crowd(tmp_path, ignore=1)
        cfg.DATASETS.TEST = (CROWD,)
        check_objects(cfg, check_datasets(cfg))
        assert f"test set '{CROWD}' has no annotated object" in caplog.text


def save(folder: Path, size: tuple[int, int], kind: str, orientation: int) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    path = folder / TEST / "images" / "1.png"  # Pillow goes by the content
    Image.new("RGB", size).save(path, kind, exif=exif)
    return path


def passes(action: Callable[[], Any]) -> bool:
    try:
        action()
    except ValueError:  # Detectron2's SizeMismatchError is one too
        return False
    return True


class TestSizes:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("turned", [False, True])
    def test_say_what_the_mapper_says(
        self, tmp_path: Path, cfg: CfgNode, kind: str, orientation: int, turned: bool
    ) -> None:
        size = (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT)
        path = save(tmp_path, size, kind, orientation)
        record = {"file_name": str(path), "image_id": 1, "width": WIDTH, "height": HEIGHT}
        expected = passes(lambda: CheckedDatasetMapper(cfg, False)(record))
        found = check_datasets(cfg)
        assert passes(lambda: check_test_files(cfg, found)) == expected
        if kind in ("JPEG", "PNG"):
            assert expected == (turned == (orientation >= 5))

    def test_another_one_is_refused(self, tmp_path: Path, cfg: CfgNode) -> None:
        path = save(tmp_path, (WIDTH + 1, HEIGHT), "PNG", 1)
        message = rf"'{TEST}': {path} has 25 x 16 pixels .*is annotated as 24 x 16. Correct width"
        with pytest.raises(ValueError, match=message):
            check_test_files(cfg, check_datasets(cfg))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TEST,), (TRAIN,)
        check_test_files(cfg, check_datasets(cfg))  # a training set is read soon enough

    def test_no_image(self, tmp_path: Path, cfg: CfgNode) -> None:
        path = tmp_path / TEST / "images" / "2.png"
        path.write_bytes(b"<html>")
        with pytest.raises(
            RuntimeError, match=rf"cannot read {path} of data set {TEST}: .*replace"
        ):
            check_test_files(cfg, check_datasets(cfg))

    def test_headers_alone_are_read_and_once(
        self, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = []
        original = Image.open

        def note(file: Any, *rest: Any, **options: Any) -> Any:
            opened.append(file)
            image = original(file, *rest, **options)
            monkeypatch.setattr(image, "load", lambda: pytest.fail("pixels were read"))
            return image

        monkeypatch.setattr(image_sizes.Image, "open", note)
        for _ in range(2):
            check_test_files(cfg, check_datasets(cfg))
        assert len(opened) == 3
