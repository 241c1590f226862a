"""CrowdHumanEvaluator through Detectron2's evaluator interface, on the synthetic crowd."""

import json
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from kd_det.config import add_kd_config
from kd_det.data.crowdhuman import register_crowdhuman
from kd_det.data.synthetic_crowd import make_synthetic_crowd
from kd_det.evaluation import crowdhuman
from kd_det.evaluation.build import build_evaluator
from kd_det.evaluation.crowdhuman import CrowdHumanEvaluator

NAME = "crowd_of_the_evaluator_test"


@pytest.fixture
def crowd(tmp_path):
    make_synthetic_crowd(tmp_path / "crowd", num_images=6, seed=3)
    register_crowdhuman(NAME, tmp_path / "crowd" / "annotation.odgt", tmp_path / "crowd" / "Images")
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def people(image) -> torch.Tensor:
    """The people of an image as a detector can see them: inside it."""
    boxes = [
        BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        for a in image["annotations"]
        if not a["iscrowd"]
    ]
    clipped = Boxes(torch.tensor(boxes))
    clipped.clip((image["height"], image["width"]))
    return clipped.tensor


def detected(image, boxes: torch.Tensor, score: float = 0.95, category: int = 0) -> dict:
    instances = Instances((image["height"], image["width"]))
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.full((len(boxes),), score)
    instances.pred_classes = torch.full((len(boxes),), category)
    return {"instances": instances}


def oracle(batch: list[dict]) -> list[dict]:
    return [detected(image, people(image)) for image in batch]


def test_the_truth_is_perfect(crowd, tmp_path):
    evaluator = CrowdHumanEvaluator(NAME, output_dir=str(tmp_path / "out"), rules="smooth")
    results = inference_on_dataset(oracle, [crowd[4:], crowd[:4]], evaluator)
    assert results == {"bbox": {"AP": 100.0, "MR": 0.0, "JI": 100.0, "recall": 100.0}}

    found = inference_on_dataset(oracle, [crowd], CrowdHumanEvaluator(NAME))["bbox"]
    count = sum(len(people(image)) for image in crowd)
    assert found["AP"] == pytest.approx(100 * (1 - 1 / count))  # nothing before the first detection
    assert found["JI"] == pytest.approx(100, abs=1e-3) and found["JI"] < 100
    assert (found["MR"], found["recall"]) == (0, 100)

    saved = json.loads((tmp_path / "out" / "crowdhuman_predictions.json").read_text())
    assert len(saved) == sum(len(people(image)) for image in crowd)
    x0, y0, x1, y1 = people(crowd[4])[0].tolist()
    assert saved[0] == {
        "image_id": crowd[4]["image_id"],
        "category_id": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": pytest.approx(0.95),
    }


def test_boxes_count_inside_the_image(tmp_path):
    """A quarter of this person is in the image; against the rest, the detection would be lost."""
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "Images" / "a.jpg")
    box = {"tag": "person", "fbox": [-30, 0, 40, 30], "extra": {}}
    (tmp_path / "a.odgt").write_text(json.dumps({"ID": "a", "gtboxes": [box]}))
    register_crowdhuman(NAME, tmp_path / "a.odgt", tmp_path / "Images")
    try:
        images = DatasetCatalog.get(NAME)
        evaluator = CrowdHumanEvaluator(NAME, distributed=False)
        # With one person the official AP, without what comes before the first detection, is 0.
        for seen in ([0.0, 0.0, 10.0, 30.0], [-30.0, 0.0, 10.0, 30.0]):
            evaluator.reset()
            evaluator.process(images, [detected(images[0], torch.tensor([seen]))])
            assert evaluator.evaluate()["bbox"]["recall"] == 100
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def test_reset_forgets_and_missing_images_count(crowd, caplog):
    evaluator = CrowdHumanEvaluator(NAME, distributed=False)
    evaluator.process(crowd, oracle(crowd))
    evaluator.reset()
    evaluator.process(crowd[:2], oracle(crowd[:2]))
    with caplog.at_level(logging.INFO, logger=crowdhuman.__name__):
        found = evaluator.evaluate()["bbox"]
    here, everywhere = (sum(len(people(image)) for image in part) for part in (crowd[:2], crowd))
    assert found["recall"] == pytest.approx(100 * here / everywhere)
    assert found["AP"] == pytest.approx(100 * (here - 1) / everywhere)
    assert found["JI"] < 60
    assert "4 of the 6 images" in caplog.text
    assert "recall" in caplog.text


def test_detections_in_ignore_regions_do_not_count(crowd):
    regions = {
        image["image_id"]: torch.tensor(
            [
                BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
                for a in image["annotations"]
                if a["iscrowd"]
            ]
        ).reshape(-1, 4)
        for image in crowd
    }
    assert sum(len(boxes) for boxes in regions.values()) > 2
    evaluator = CrowdHumanEvaluator(NAME, rules="smooth")
    for image in crowd:
        # Of lower score than the people, so that none of them is taken by a detection of a region.
        both = oracle([image])[0]["instances"], detected(image, regions[image["image_id"]], 0.91)
        evaluator.process([image], [{"instances": Instances.cat([both[0], both[1]["instances"]])}])
    found = evaluator.evaluate()["bbox"]
    assert found == {"AP": 100.0, "MR": 0.0, "JI": 100.0, "recall": 100.0}


def test_processes_are_gathered_and_only_the_main_one_answers(crowd, monkeypatch):
    parts = []
    for share in (crowd[:3], crowd[3:]):
        evaluator = CrowdHumanEvaluator(NAME, rules="smooth")
        evaluator.process(share, oracle(share))
        parts.append(evaluator._predictions)
    monkeypatch.setattr(crowdhuman.comm, "gather", lambda data, dst: parts)
    assert evaluator.evaluate()["bbox"]["AP"] == 100.0
    monkeypatch.setattr(crowdhuman.comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() == {}


def test_half_precision_and_empty_detections_are_taken(crowd):
    evaluator = CrowdHumanEvaluator(NAME)
    half = detected(crowd[0], people(crowd[0]).half(), 0.5)
    half["instances"].scores = half["instances"].scores.half()
    evaluator.process(crowd[:2], [half, detected(crowd[1], torch.zeros(0, 4))])
    assert evaluator.evaluate()["bbox"]["recall"] > 0


def test_the_rules_come_from_the_config(crowd, tmp_path):
    cfg = get_cfg()
    add_kd_config(cfg)
    found = {}
    for rules in ("official", "smooth"):
        cfg.TEST.CROWDHUMAN_RULES = rules
        evaluator = build_evaluator(cfg, NAME, str(tmp_path))
        found[rules] = inference_on_dataset(oracle, [crowd], evaluator)["bbox"]["AP"]
    assert found["official"] < found["smooth"] == 100
    cfg.TEST.CROWDHUMAN_RULES = "offical"
    with pytest.raises(ValueError, match=r"is 'offical'; expected one of \['official', 'smooth'"):
        build_evaluator(cfg, NAME, str(tmp_path))


def test_what_does_not_belong_is_refused(crowd):
    evaluator = CrowdHumanEvaluator(NAME)
    with pytest.raises(KeyError, match=f"'elsewhere' is not in {NAME}"):
        evaluator.process([{"image_id": "elsewhere"}], [{}])
    other = detected(crowd[0], torch.tensor([[0.0, 0, 5, 5]]), category=17)
    with pytest.raises(ValueError, match=r"found class 17 .* expected class 0 \(person\)"):
        evaluator.process(crowd[:1], [other])
