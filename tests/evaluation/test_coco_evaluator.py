"""The COCO evaluator: equal to Detectron2's with either library, and sane where that one is not."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from random_detections import KEYPOINTS, SIDE, mask_of_box, random_results, random_truth

from kd_det.evaluation import coco
from kd_det.evaluation.build import build_evaluator
from kd_det.evaluation.coco import COCODetectionEvaluator, resolve_backend

BACKENDS = [
    "pycocotools",
    pytest.param(
        "faster_coco_eval",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("faster_coco_eval") is None, reason="optional library"
        ),
    ),
]
SIGMAS = [0.08] * KEYPOINTS
TASKS = ("bbox", "segm", "keypoints")
Results = dict[str, dict[str, float]]


class Data:
    """A registered random data set with predictions as a model returns them."""

    def __init__(self, folder: Path, truth: dict[str, Any]) -> None:
        self.name = f"random_{folder.name}"
        self.truth = truth
        self.results = random_results(np.random.default_rng(1), truth)
        json_file = folder / "truth.json"
        json_file.write_text(json.dumps(truth))
        self.ids = {c["id"]: i for i, c in enumerate(truth["categories"])}
        DatasetCatalog.register(self.name, list)
        MetadataCatalog.get(self.name).set(
            json_file=str(json_file),
            evaluator_type="coco",
            thing_classes=[c["name"] for c in truth["categories"]],
            thing_dataset_id_to_contiguous_id=self.ids,
        )

    def close(self) -> None:
        DatasetCatalog.remove(self.name)
        MetadataCatalog.remove(self.name)

    def run(self, evaluator: COCOEvaluator, *, extras: bool = True, empty: bool = False) -> Results:
        """Feed all images through an evaluator, without any detection if `empty`."""
        evaluator.reset()
        for image in self.truth["images"]:
            of_image = [r for r in self.results if r["image_id"] == image["id"] and not empty]
            instances = Instances((SIDE, SIDE))
            boxes = torch.tensor([r["bbox"] for r in of_image], dtype=torch.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.tensor([r["score"] for r in of_image])
            instances.pred_classes = torch.tensor([self.ids[r["category_id"]] for r in of_image])
            if extras:
                masks = [mask_of_box(r["bbox"]) for r in of_image]
                instances.pred_masks = torch.tensor(np.array(masks)).reshape(-1, SIDE, SIDE)
                keypoints = torch.tensor([r["keypoints"] for r in of_image])
                instances.pred_keypoints = keypoints.reshape(-1, KEYPOINTS, 3)
            evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
        metrics: Results = evaluator.evaluate()
        return metrics


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Data]:
    made = Data(tmp_path, random_truth(np.random.default_rng(0)))
    yield made
    made.close()


def assert_equal(found: Results, expected: Results, *, atol: float = 1e-9) -> None:
    assert {task: list(found[task]) for task in found} == {t: list(expected[t]) for t in expected}
    for task in expected:
        for key, value in expected[task].items():
            assert found[task][key] == pytest.approx(value, abs=atol, nan_ok=True), (task, key)


@pytest.mark.parametrize("max_dets", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_and_files_are_detectron2s(
    data: Data, tmp_path: Path, backend: str, max_dets: int | None
) -> None:
    folders = [tmp_path / name for name in ("stock", "ours")]
    options: dict[str, Any] = {"kpt_oks_sigmas": SIGMAS, "max_dets_per_image": max_dets}
    stock = COCOEvaluator(data.name, output_dir=str(folders[0]), use_fast_impl=False, **options)
    expected = data.run(stock)
    ours = COCODetectionEvaluator(data.name, output_dir=str(folders[1]), backend=backend, **options)
    found = data.run(ours)
    assert set(expected) == set(TASKS)
    assert 5 < expected["bbox"]["AP"] < 95 and 0 < expected["keypoints"]["AP"] < 95
    assert_equal(found, expected)
    saved = [json.loads((f / "coco_instances_results.json").read_text()) for f in folders]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_printed_and_the_summary_is_logged(
    data: Data, backend: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="kd_det"):
        data.run(COCODetectionEvaluator(data.name, ("bbox",), backend=backend))
    assert capsys.readouterr().out == ""
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_give_zero_where_there_are_objects(data: Data, backend: str) -> None:
    for annotation in data.truth["annotations"]:
        annotation["area"] = min(annotation["area"], 9000)  # no large object
        annotation["category_id"] = min(annotation["category_id"], 3)  # none of the last class
    Path(MetadataCatalog.get(data.name).json_file).write_text(json.dumps(data.truth))
    evaluator = COCODetectionEvaluator(data.name, TASKS, backend=backend, kpt_oks_sigmas=SIGMAS)
    metrics = data.run(evaluator, empty=True)
    assert set(metrics) == set(TASKS)
    for task in TASKS:
        assert metrics[task]["AP"] == metrics[task]["AP50"] == metrics[task]["APm"] == 0
        assert metrics[task]["AP-kind0"] == 0
        assert math.isnan(metrics[task]["APl"]) and math.isnan(metrics[task]["AP-kind2"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_object_with_annotation_id_zero_can_be_found(tmp_path: Path, backend: str) -> None:
    truth = random_truth(np.random.default_rng(0), images=1, classes=1)
    truth["annotations"] = [{**truth["annotations"][0], "id": 0, "iscrowd": 0}]
    data = Data(tmp_path, truth)
    box = truth["annotations"][0]["bbox"]
    data.results = [{"image_id": 3, "category_id": 1, "bbox": box, "score": 0.5}]
    found = data.run(COCODetectionEvaluator(data.name, backend=backend), extras=False)
    data.close()
    assert found["bbox"]["AP"] == pytest.approx(100)


def test_evaluating_twice_gives_the_same(data: Data) -> None:
    evaluator = COCODetectionEvaluator(data.name, kpt_oks_sigmas=SIGMAS)
    assert_equal(data.run(evaluator), data.run(evaluator), atol=0)


def test_some_images_only(data: Data) -> None:
    evaluator = COCODetectionEvaluator(data.name, ("bbox",))
    everything = data.run(evaluator)
    part = evaluator.evaluate(img_ids=[image["id"] for image in data.truth["images"][:4]])
    assert part["bbox"]["AP"] != everything["bbox"]["AP"]


def test_errors_say_what_to_change(data: Data) -> None:
    with pytest.raises(ValueError, match=r"COCO_BACKEND is 'fast'; expected one of \['auto', "):
        resolve_backend("fast")
    with pytest.raises(ValueError, match=r"'sigmas': 17, 'truth': 4, 'predictions': 4"):
        data.run(COCODetectionEvaluator(data.name, ("keypoints",)))
    with pytest.raises(ValueError, match=r"task 'segm' needs 'segmentation'"):
        data.run(COCODetectionEvaluator(data.name, ("bbox", "segm")), extras=False)
    data.ids = {category_id: 99 for category_id in data.ids}
    with pytest.raises(ValueError, match=r"has class 99, but .* the classes 0 to 2"):
        data.run(COCODetectionEvaluator(data.name), extras=False)


def test_detectron2s_own_evaluator_needs_no_extension(data: Data) -> None:
    """As its LazyConfigs build it: with its fast code, which an uncompiled 0.6 does not have."""
    ours = data.run(COCODetectionEvaluator(data.name, ("bbox",)))
    theirs = data.run(COCOEvaluator(data.name, ("bbox",)))
    assert theirs["bbox"]["AP"] == pytest.approx(ours["bbox"]["AP"])


def test_image_ids_that_are_texts_are_refused_before_they_are_needed(tmp_path: Path) -> None:
    truth = random_truth(np.random.default_rng(0))
    for entry, key in [(x, "id") for x in truth["images"]] + [
        (x, "image_id") for x in truth["annotations"]
    ]:
        entry[key] = f"{entry[key]}.png"
    named = Data(tmp_path, truth)
    try:
        with pytest.raises(ValueError, match=r"truth\.json\) has the image id '\w+\.png'; .*whole"):
            COCODetectionEvaluator(named.name, ("bbox",))
    finally:
        named.close()


def test_auto_is_pycocotools_without_the_fast_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto") == "pycocotools"
    with pytest.raises(ImportError, match=r"install kd_det\[eval\]"):
        resolve_backend("faster_coco_eval")


def test_the_fast_library_is_imported_by_its_own_backend_alone(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # importing it raises
    spec = importlib.util.spec_from_file_location("fresh", coco.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert data.run(fresh.COCODetectionEvaluator(data.name, ("bbox",)))["bbox"]["AP"] > 0


def test_a_data_set_made_on_first_use_is_made(data: Data) -> None:
    json_file = Path(MetadataCatalog.get(data.name).json_file)
    content = json_file.read_text()
    json_file.unlink()
    DatasetCatalog.remove(data.name)
    DatasetCatalog.register(data.name, lambda: json_file.write_text(content))
    assert COCODetectionEvaluator(data.name)._coco_api.imgs


class TestBuildEvaluator:
    @staticmethod
    def config() -> Any:
        cfg = get_cfg()
        cfg.TEST.COCO_BACKEND = "pycocotools"
        return cfg

    def test_tasks_follow_the_config(self, data: Data, tmp_path: Path) -> None:
        cfg = self.config()
        evaluator = build_evaluator(cfg, data.name, str(tmp_path))
        assert isinstance(evaluator, COCODetectionEvaluator)
        assert set(data.run(evaluator)) == {"bbox"}
        cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
        cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
        assert set(data.run(build_evaluator(cfg, data.name, str(tmp_path)))) == set(TASKS)

    def test_an_unknown_type_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'no_such_type'; .* \['coco', 'crowdhuman'"):
            MetadataCatalog.get("unknown_type").evaluator_type = "no_such_type"
            build_evaluator(self.config(), "unknown_type", str(tmp_path))
        MetadataCatalog.remove("unknown_type")
