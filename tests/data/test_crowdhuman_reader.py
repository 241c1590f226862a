"""Reading CrowdHuman's format, remembering image sizes, and the synthetic crowd."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image
from tiny_crowd import crowd_kept_in

from kd_det.data import crowdhuman
from kd_det.data.crowdhuman import load_crowdhuman, register_builtin_crowd, register_crowdhuman
from kd_det.data.synthetic_crowd import make_synthetic_crowd


def person(fbox, **extra):
    return {"tag": "person", "fbox": fbox, "vbox": fbox, "hbox": fbox, "extra": extra}


def write(folder: Path, *records) -> tuple[Path, Path]:
    """Records are dicts, or lines as they are; each image is 40 x 30."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "a.odgt").write_text("\n".join(lines) + "\n")
    images = folder / "Images"
    images.mkdir(exist_ok=True)
    for record in records:
        if isinstance(record, dict) and "ID" in record:
            Image.new("RGB", (40, 30)).save(images / f"{record['ID']}.jpg")
    return folder / "a.odgt", images


def test_reads_boxes_ignore_flags_and_sizes(tmp_path):
    boxes = [
        person([-5, 2, 20, 25], box_id=0, occ=1),
        person([1, 2, 3, 4], ignore=0),
        person([5, 6, 7, 8], ignore=1),
        {"tag": "mask", "fbox": [0, 0, 9, 9], "extra": {"ignore": 0}},
        {"tag": "person", "fbox": [2, 2, 4, 4.5]},
    ]
    odgt, images = write(
        tmp_path, {"ID": "282555,5de0", "gtboxes": boxes}, "", {"ID": "b", "gtboxes": []}
    )
    first, second = load_crowdhuman(odgt, images)
    assert first["file_name"] == str(images / "282555,5de0.jpg")
    assert (first["image_id"], first["width"], first["height"]) == ("282555,5de0", 40, 30)
    assert [a["bbox"] for a in first["annotations"]] == [b["fbox"] for b in boxes]
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 0, 1, 1, 0]
    assert {a["category_id"] for a in first["annotations"]} == {0}
    assert {a["bbox_mode"] for a in first["annotations"]} == {BoxMode.XYWH_ABS}
    assert second["annotations"] == []


@pytest.mark.parametrize("fbox", [[40, 0, 5, 5], [0, -9, 5, 9], [3, 3, 0, 5], [3, 3, 5, -2]])
def test_persons_nobody_can_find_are_ignored_and_reported(tmp_path, caplog, fbox):
    record = {"ID": "a", "gtboxes": [person([39, 29, 5, 5]), person(fbox)]}
    with caplog.at_level(logging.WARNING, logger=crowdhuman.__name__):
        (image,) = load_crowdhuman(*write(tmp_path, record))
    assert [a["iscrowd"] for a in image["annotations"]] == [0, 1]
    assert "1 persons have no area inside their image" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"a\.odgt, line 2: no JSON"),
        ("[1]", r"line 2: found list; expected \{\"ID\""),
        ({"ID": "b"}, r"line 2: found \['ID'\]; expected"),
        ({"ID": "a", "gtboxes": []}, r"line 2: ID 'a' is also on line 1"),
        (
            {"ID": "b", "gtboxes": [person([1, 1, 2, 2]), {"tag": "mask", "hbox": [1, 1, 2, 2]}]},
            r"line 2, box 1 of 'b': found \['hbox', 'tag'\]; expected at least \"tag\" and",
        ),
        ({"ID": "b", "gtboxes": [person([1, 2, 3])]}, r"line 2, box 0 of 'b': fbox is \[1, 2, 3\]"),
        ({"ID": "b", "gtboxes": [person([1, 2, 3, float("nan")])]}, "four finite numbers"),
        ({"ID": "b", "gtboxes": [person("1234")]}, "fbox is 1234"),
        ({"ID": "b", "gtboxes": [person([True, 2, 3, 4])]}, r"fbox is \[True"),
        ({"ID": "b", "gtboxes": None}, "line 2: gtboxes is None"),
        ({"ID": "b", "gtboxes": {}}, r"line 2: gtboxes is \{\}"),
        (
            {"ID": "b", "gtboxes": [{**person([1, 2, 3, 4]), "extra": None}]},
            "box 0 of 'b': extra is None; expected",
        ),
        (
            {"ID": "b", "gtboxes": [{**person([1, 2, 3, 4]), "extra": {"ignore": "0"}}]},
            r"extra is \{'ignore': '0'\}; expected",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []}, line)
    with pytest.raises(ValueError, match=message):
        load_crowdhuman(odgt, images)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found no annotated image"):
        load_crowdhuman(*write(tmp_path, ""))


def test_an_absent_image_is_named(tmp_path):
    odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []})
    (images / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*a\.jpg for ID 'a'"):
        load_crowdhuman(odgt, images)


def test_sizes_are_read_once_and_again_after_a_change(tmp_path, monkeypatch):
    odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []}, {"ID": "b", "gtboxes": []})
    load_crowdhuman(odgt, images)
    read = []
    original = crowdhuman._read_size
    monkeypatch.setattr(crowdhuman, "_read_size", lambda f: (read.append(f.name), original(f))[1])
    load_crowdhuman(odgt, images)
    assert read == []
    Image.new("RGB", (400, 300)).save(images / "b.jpg")
    assert [(i["width"], i["height"]) for i in load_crowdhuman(odgt, images)] == [
        (40, 30),
        (400, 300),
    ]
    assert read == ["b.jpg"]
    for damaged in ("{damaged", "[]", '{"b": 5}'):
        (tmp_path / "a.sizes.json").write_text(damaged)
        assert load_crowdhuman(odgt, images)[1]["width"] == 400


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(tmp_path, monkeypatch):
    odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []})

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")  # as root, permissions on the folder would not refuse

    monkeypatch.setattr(crowdhuman, "write_text", refuse)
    assert load_crowdhuman(odgt, images)[0]["width"] == 40
    assert sorted(f.name for f in tmp_path.iterdir()) == ["Images", "a.odgt"]


def test_sizes_are_those_of_the_image_turned_upright(tmp_path):
    odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []})
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(images / "a.jpg", exif=exif)
    (image,) = load_crowdhuman(odgt, images)
    assert read_image(image["file_name"], "BGR").shape[:2] == (image["height"], image["width"])
    assert (image["width"], image["height"]) == (30, 40)


def test_own_data_is_registered_without_being_read(tmp_path):
    name = "own_crowd_of_the_reader_test"
    register_crowdhuman(name, tmp_path / "a.odgt", tmp_path / "Images")  # does not exist yet
    try:
        write(tmp_path, {"ID": "a", "gtboxes": [person([1, 1, 5, 5])]})
        assert [image["image_id"] for image in DatasetCatalog.get(name)] == ["a"]
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "crowdhuman"
        assert metadata.thing_classes == ["person"]
        assert metadata.odgt_file == str(tmp_path / "a.odgt")
        assert metadata.image_root == str(tmp_path / "Images")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_absent_crowdhuman_names_the_variable(tmp_path):
    register_builtin_crowd()
    register_builtin_crowd()
    assert {"crowdhuman_train", "crowdhuman_val", "crowd_tiny_train"} <= set(DatasetCatalog.list())
    with pytest.raises(FileNotFoundError, match="set DETECTRON2_DATASETS before the start"):
        crowdhuman._load_official(tmp_path / "annotation_val.odgt", tmp_path)
    assert MetadataCatalog.get("crowdhuman_val").odgt_file.endswith(
        "crowdhuman/annotation_val.odgt"
    )


# ---- the synthetic crowd ------------------------------------------------------------------------


def test_synthetic_crowd_follows_from_its_seed(tmp_path):
    for name, num_images, seed in [("a", 3, 5), ("b", 4, 5), ("c", 3, 6)]:
        make_synthetic_crowd(tmp_path / name, num_images=num_images, seed=seed)
    lines = {n: (tmp_path / n / "annotation.odgt").read_text().splitlines() for n in "abc"}
    assert lines["a"] == lines["b"][:3]
    assert all(x != y for x, y in zip(lines["a"], lines["c"], strict=True))
    images = [(tmp_path / n / "Images" / "crowd-5-0002.jpg").read_bytes() for n in "ab"]
    assert images[0] == images[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no drafts left


def test_synthetic_crowd_is_crowded(tmp_path):
    make_synthetic_crowd(tmp_path / "crowd", num_images=40, seed=1)
    odgt = tmp_path / "crowd" / "annotation.odgt"
    dataset = load_crowdhuman(odgt, tmp_path / "crowd" / "Images")
    assert read_image(dataset[0]["file_name"]).shape == (192, 256, 3)

    closest, outside = [], 0
    for image in dataset:
        kept = [a["bbox"] for a in image["annotations"] if not a["iscrowd"]]
        assert kept
        for i, (x, y, w, h) in enumerate(kept):
            outside += x < 0 or y < 0 or x + w > 256 or y + h > 192
            best = 0.0
            for j, (u, v, p, q) in enumerate(kept):
                if i != j:
                    common = max(min(x + w, u + p) - max(x, u), 0) * max(
                        min(y + h, v + q) - max(y, v), 0
                    )
                    best = max(best, common / (w * h + p * q - common))
            closest.append(best)
    assert np.mean(np.array(closest) > 0.3) > 0.4
    assert outside > 10

    boxes = [b for line in odgt.read_text().splitlines() for b in json.loads(line)["gtboxes"]]
    people = [b for b in boxes if b["tag"] == "person"]
    ignored = sum(b["extra"]["ignore"] for b in people)
    assert 0 < ignored < 0.3 * len(people)
    assert 0 < len(boxes) - len(people) < 40
    for b in people:  # what is seen of a person lies inside the person and the image
        (x, y, w, h), (u, v, p, q) = b["fbox"], b["vbox"]
        assert max(x, 0) <= u and max(y, 0) <= v
        assert u + p <= min(x + w, 256) and v + q <= min(y + h, 192)


def test_synthetic_crowd_refuses_to_mix_with_other_files(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        make_synthetic_crowd(tmp_path, num_images=1, seed=0)
    with pytest.raises(ValueError, match="num_images is 0"):
        make_synthetic_crowd(tmp_path / "new", num_images=0, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_crowd_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_crowd(tmp_path / "crowd", num_images=2, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    original = Image.Image.save

    def save(image, *args, **kwargs):  # while the first image is drawn, somebody else finishes
        monkeypatch.setattr(Image.Image, "save", original)
        make_synthetic_crowd(tmp_path / "crowd", num_images=1, seed=0)
        original(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(FileExistsError, match="made by another process"):
        make_synthetic_crowd(tmp_path / "crowd", num_images=1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["crowd"]

    def lose(root, **kwargs):
        make_synthetic_crowd(root, **kwargs)
        raise FileExistsError

    monkeypatch.setattr(crowdhuman, "make_synthetic_crowd", lose)
    assert len(crowdhuman._load_tiny(tmp_path / "tiny", "val")) == 40


def test_tiny_crowd_is_made_once_in_the_cache_of_its_registration(tmp_path, monkeypatch):
    with crowd_kept_in(tmp_path / "cache"):
        monkeypatch.setenv("KD_DET_CACHE", str(tmp_path / "later"))
        dataset = DatasetCatalog.get("crowd_tiny_val")
        assert len(dataset) == 40
        assert all(Path(item["file_name"]).is_relative_to(tmp_path / "cache") for item in dataset)

        def refuse(*args, **kwargs):
            raise AssertionError("made again")

        monkeypatch.setattr(crowdhuman, "make_synthetic_crowd", refuse)
        assert DatasetCatalog.get("crowd_tiny_val") == dataset
        assert MetadataCatalog.get("crowd_tiny_val").evaluator_type == "crowdhuman"


def test_somebody_elses_crowdhuman_leaves_the_synthetic_crowd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("crowdhuman_train", "crowd_tiny_train")
    kept = {name: DatasetCatalog.pop(name) for name in names}
    metadata = {name: MetadataCatalog.pop(name) for name in names}
    try:
        DatasetCatalog.register("crowdhuman_train", lambda: [{"theirs": True}])
        register_builtin_crowd()
        assert DatasetCatalog.get("crowdhuman_train") == [{"theirs": True}]
        assert "crowd_tiny_train" in DatasetCatalog
    finally:
        for name in names:
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.pop(name, None)
            DatasetCatalog.register(name, kept[name])
            MetadataCatalog[name] = metadata[name]


NAN, INF = float("nan"), float("inf")


class TestHostileLines:
    @pytest.mark.parametrize(
        "fbox",
        [
            [NAN, 1, 2, 2],
            [1, INF, 2, 2],
            [1, 1, -INF, 2],
            [1, 1, 2, 10**400],
            [1e9, 1, 2, 2],
            ["1", 1, 2, 2],
            [None, 1, 2, 2],
            [True, 1, 2, 2],
            [[1], 1, 2, 2],
            [1, 1, 2],
            None,
            {},
            "1 1 2 2",
        ],
    )
    def test_boxes_of_no_numbers(self, tmp_path, fbox):
        odgt, images = write(tmp_path, {"ID": "a", "gtboxes": [person(fbox)]})
        with pytest.raises(ValueError, match=r"a\.odgt, line 1, box 0 of 'a': fbox is .*four fin"):
            load_crowdhuman(odgt, images)

    @pytest.mark.parametrize("fbox", [[500, 0, 9, 9], [0, -500, 9, 9], [0, 0, 9, 500]])
    def test_boxes_far_off_their_image(self, tmp_path, fbox):
        """40 x 30 pixels: what is more than 400 pixels away is a mistake."""
        odgt, images = write(tmp_path, {"ID": "a", "gtboxes": [person([1, 1, 2, 2]), person(fbox)]})
        message = r"a\.odgt: box 1 of 'a' has the fbox .*40 x 30 pixels; .* from -400 to 440"
        with pytest.raises(ValueError, match=message):
            load_crowdhuman(odgt, images)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"ID": "a", "gtboxes": ' + "[" * 99999, r"line 1: no JSON"),
            ('{"ID": ["a"], "gtboxes": []}', r"line 1: ID is \['a'\]; expected the image's name"),
            ('{"ID": null, "gtboxes": []}', r"line 1: ID is None; expected"),
            ('{"ID": "a\\u0000", "gtboxes": []}', r"no image .* for ID"),
            ('{"ID": "a", "gtboxes": null}', r"line 1: gtboxes is None"),
            ('{"ID": "a", "gtboxes": [null]}', r"box 0 of 'a': found None; expected at"),
        ],
    )
    def test_lines(self, tmp_path, line, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_crowdhuman(*write(tmp_path, line))

    @pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0"])
    def test_images_without_a_size(self, tmp_path, content):
        odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []})
        (images / "a.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the size of .*a\.jpg: .*replace the"):
            load_crowdhuman(odgt, images)

    @pytest.mark.parametrize("entry", [[0, 0, 0], ["a", "b"], [None] * 3, [1, [], 1], {"a": 1}])
    def test_remembered_sizes_that_are_none(self, tmp_path, entry):
        odgt, images = write(tmp_path, {"ID": "a", "gtboxes": []})
        length = (images / "a.jpg").stat().st_size
        if isinstance(entry, list) and entry:
            entry = [length, *entry[1:]]
        (tmp_path / "a.sizes.json").write_text(json.dumps({"a": entry}))
        (image,) = load_crowdhuman(odgt, images)
        assert (image["width"], image["height"]) == (40, 30)
