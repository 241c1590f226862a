"""The built-in shapes: deterministic, safe to make at the same time, and truthfully annotated."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from kd_det.data import shapes
from kd_det.data.catalog import SHAPES
from kd_det.data.drawing import clip_polygon, coverage, outline, polygon_area, texture
from kd_det.data.scene import compose
from kd_det.data.shapes import make_shapes, shapes_json
from kd_det.data.styles import V1, V2, Style

Made = tuple[Path, dict[str, Any], Style]


@pytest.fixture(scope="module", params=[V1, V2], ids=["v1", "v2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    style, root = request.param, tmp_path_factory.mktemp("shapes")
    json_file = make_shapes(root, split="val", num_images=40, size=style.size, style=style)
    return json_file, json.loads(json_file.read_text()), style


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        make_shapes(tmp_path / name, split="a", num_images=3, size=64) for name in ("x", "y")
    )
    for file in ("annotations.json", "images/000002.jpg"):
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes()


# Committed results rest on these. Of the pixels, means: resampling rounds differently elsewhere.
DIGESTS = {
    1: ("a1630301ba312741", [121.73, 83.13, 104.81]),
    2: ("b90a38a1dea053e6", [118.72, 128.34, 90.98]),
}


@pytest.mark.parametrize("style", [V1, V2], ids=["v1", "v2"])
def test_the_sets_are_those_of_the_committed_results(tmp_path: Path, style: Style) -> None:
    json_file = make_shapes(tmp_path, split="val", num_images=3, size=style.size, style=style)
    digest, means = DIGESTS[style.version]
    assert hashlib.sha256(json_file.read_bytes()).hexdigest()[:16] == digest
    found = [
        cv2.imread(str(file)).mean() for file in sorted((json_file.parent / "images").iterdir())
    ]
    assert found == pytest.approx(means, abs=0.05)


def test_registered_splits_share_no_image(tmp_path: Path) -> None:
    """An image depends on version, split and number, so that a set's beginning stands for it."""
    assert len({(style.version, split) for style, split, _ in SHAPES.values()}) == len(SHAPES)
    seen: set[bytes] = set()
    for style, split, _ in SHAPES.values():
        json_file = make_shapes(tmp_path, split=split, num_images=3, size=style.size, style=style)
        seen |= {file.read_bytes() for file in (json_file.parent / "images").iterdir()}
    assert len(seen) == 3 * len(SHAPES)


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "b"}])
def test_seed_and_split_change_the_images(tmp_path: Path, other: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"split": "a", "num_images": 1, "size": 64, "seed": 0}
    first = make_shapes(tmp_path, **arguments)
    second = make_shapes(tmp_path, **{**arguments, **other})
    assert first.read_text() != second.read_text()


def test_fewer_images_are_the_beginning_of_more(tmp_path: Path) -> None:
    few, many = (
        json.loads(make_shapes(tmp_path, split="a", num_images=n, size=64).read_text())
        for n in (2, 4)
    )
    assert many["images"][:2] == few["images"]
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_file = make_shapes(tmp_path, split="a", num_images=1, size=64)
    monkeypatch.setattr(shapes, "_write", None)
    assert make_shapes(tmp_path, split="a", num_images=1, size=64) == json_file


def test_makers_at_the_same_time_draw_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    write = shapes._write

    def counting(folder: Path, **arguments: Any) -> None:
        calls.append(folder)
        write(folder, **arguments)

    monkeypatch.setattr(shapes, "_write", counting)
    arguments: dict[str, Any] = {"split": "a", "num_images": 4, "size": 64}
    threads = [
        threading.Thread(target=make_shapes, args=(tmp_path,), kwargs=arguments) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json_file = shapes_json(tmp_path, **arguments)
    assert len(calls) == 1
    assert len(list((json_file.parent / "images").iterdir())) == 4


def test_one_that_lost_the_race_uses_the_other_ones_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"split": "a", "num_images": 1, "size": 64}
    json_file = shapes_json(tmp_path, **arguments)
    write = shapes._write

    def overtaken(folder: Path, **rest: Any) -> None:
        write(folder, **rest)
        json_file.parent.mkdir()
        json_file.write_text("the other one's")

    monkeypatch.setattr(shapes, "_write", overtaken)
    assert make_shapes(tmp_path, **arguments).read_text() == "the other one's"
    leftovers = [p for p in json_file.parent.parent.iterdir() if p.name.startswith(".a-")]
    assert leftovers == []


def test_a_crash_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cv2, "imwrite", crash)
        make_shapes(tmp_path, split="a", num_images=2, size=64)
    json_file = make_shapes(tmp_path, split="a", num_images=2, size=64)
    assert len(os.listdir(json_file.parent / "images")) == 2
    assert not [p for p in json_file.parent.parent.iterdir() if p.name.startswith(".a-")]


def test_boxes_areas_and_polygons_agree(made: Made) -> None:
    _, content, _ = made
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    assert len(content["annotations"]) > 100
    for annotation in content["annotations"]:
        width, height = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert 0 <= x and 0 <= y and x + w <= width + 0.02 and y + h <= height + 0.02
        polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        np.testing.assert_allclose(polygon.min(0), (x, y), atol=0.02)
        np.testing.assert_allclose(polygon.max(0), (x + w, y + h), atol=0.02)
        rle = mask_util.frPyObjects(annotation["segmentation"], height, width)
        # Rasterised, the polygon is right to about half a pixel along its border.
        assert abs(mask_util.area(rle)[0] - annotation["area"]) < 6 * (w + h) ** 0.5 + 6


def test_keypoints_touch_their_sides_of_the_box(made: Made) -> None:
    _, content, _ = made
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    seen = {0: 0, 1: 0, 2: 0}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = np.array(annotation["keypoints"]).reshape(4, 3)
        width, height = sizes[annotation["image_id"]]
        side = [(1, y, height), (0, x + w, width), (1, y + h, height), (0, x, width)]
        for (px, py, visibility), (axis, value, limit) in zip(points, side, strict=True):
            seen[int(visibility)] += 1
            if visibility:
                # Pixel indices, kept inside the image: half a pixel less than coordinates.
                expected = np.clip(value - 0.5, 0, limit - 1)
                assert abs((px, py)[axis] - expected) < 0.03
        assert annotation["num_keypoints"] == (points[:, 2] > 0).sum()
    assert min(seen.values()) > 10


def test_the_whole_range_of_sizes_and_all_classes(made: Made) -> None:
    _, content, style = made
    longest = np.array([max(a["bbox"][2:]) for a in content["annotations"]])
    assert longest.min() < 1.4 * style.smallest
    assert 0.8 * style.largest * style.size < longest.max() <= 1.25 * style.largest * style.size
    classes = set(style.classes)
    assert {a["category_id"] for a in content["annotations"]} == set(range(1, len(classes) + 1))
    assert len({(i["width"], i["height"]) for i in content["images"]}) > 20
    assert {c["name"] for c in content["categories"]} == classes


def test_images_have_the_sizes_of_the_annotation_file(made: Made) -> None:
    json_file, content, style = made
    for image in content["images"][:5]:
        pixels = cv2.imread(str(json_file.parent / "images" / image["file_name"]))
        assert pixels is not None
        assert pixels.shape == (image["height"], image["width"], 3)
        sides = pixels.shape[:2]
        assert 0.75 * style.size <= min(sides) and max(sides) <= 1.25 * style.size


@pytest.mark.parametrize("style", [V1, V2], ids=["v1", "v2"])
def test_no_object_is_hidden_or_cut_off_too_far(style: Style) -> None:
    overlaps = 0
    for seed in range(40):
        scene = compose(128, 128, np.random.default_rng(seed), style)
        for item in scene.objects:
            inside = polygon_area(item.clipped) / polygon_area(item.outline)
            assert inside >= style.least_inside
        # Recomputed from the outlines, without the scene's own bookkeeping.
        bodies = [coverage(item.outline, 128, 128) > 0.5 for item in scene.objects]
        for i, body in enumerate(bodies):
            above = np.any([np.zeros_like(body), *bodies[i + 1 :]], axis=0)
            visible = (body & ~above).sum() / body.sum()
            assert visible >= style.least_visible
            overlaps += visible < 0.95
    assert overlaps > 10


@pytest.mark.parametrize("form", ["disc", "ring", "triangle", "square", "star", "cross"])
def test_coverage_is_the_area_and_the_longer_side_is_one(form: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = outline(form, rng)
        assert np.ptp(points, axis=0).max() == pytest.approx(1)
        placed = points * 80 + (60.3, 61.7)
        filled = float(coverage(placed, 120, 125).sum())
        assert filled == pytest.approx(polygon_area(placed), rel=0.03)


def test_a_ring_has_its_hole() -> None:
    alpha = coverage(outline("ring", np.random.default_rng(0)) * 80 + 60, 120, 120)
    assert alpha[60, 60] == 0 and alpha.max() == 1


def test_clipping_keeps_what_is_inside() -> None:
    square = np.array([(-5.0, -5.0), (5, -5), (5, 5), (-5, 5)])
    clipped = clip_polygon(square, 100, 100)
    assert polygon_area(clipped) == pytest.approx(25)
    assert {tuple(p) for p in clipped} == {(0, 0), (5, 0), (5, 5), (0, 5)}
    assert len(clip_polygon(square - 20, 100, 100)) == 0
    np.testing.assert_array_equal(clip_polygon(square + 50, 100, 100), square + 50)


def test_textures_differ_and_stripes_have_two_halves() -> None:
    rng = np.random.default_rng(0)
    centre = np.array([64.0, 64.0])
    means = {
        kind: texture(kind, centre, 100, 128, 128, rng).mean()
        for kind in ("plain", "gradient", "striped", "dotted")
    }
    assert means["plain"] == 0
    assert means["gradient"] == pytest.approx(0.5, abs=0.02)
    assert means["striped"] == pytest.approx(0.5, abs=0.05)
    assert means["dotted"] == pytest.approx(np.pi * 0.33**2, abs=0.04)
    with pytest.raises(ValueError, match="unknown texture 'wavy'"):
        texture("wavy", centre, 100, 128, 128, rng)
    with pytest.raises(ValueError, match="unknown form 'blob'"):
        outline("blob", rng)
