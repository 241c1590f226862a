"""AP from precomputed matches against pycocotools, and arms compared on drawn images."""

import contextlib
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_detections import random_results, random_truth

from kd_det.evaluation.bootstrap import CocoMatches, sample_ap
from kd_det.evaluation.difference import compare_arms


def as_coco(truth: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy({"info": {}, **truth})
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def reference_ap(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], iou_type: str = "bbox"
) -> tuple[float, float]:
    """AP and AP50 by pycocotools."""
    entries = copy.deepcopy(list(results))
    if iou_type == "segm":
        for entry in entries:
            del entry["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = as_coco(truth)
        evaluation = COCOeval(coco, coco.loadRes(entries), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def resampled(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], counts: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data set with image i present counts[i] times under new ids, copies side by side."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            new_id = len(images) + 1
            images.append({**image, "id": new_id})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image["id"]:
                    ids = {"id": len(annotations) + 1, "image_id": new_id}
                    annotations.append({**annotation, **ids})
            for result in results:
                if result["image_id"] == image["id"]:
                    detections.append({**result, "image_id": new_id})
    categories = truth["categories"]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ap_is_that_of_pycocotools(seed: int, iou_type: Any) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    results = random_results(rng, truth)
    found = CocoMatches.from_coco(as_coco(truth), results, iou_type=iou_type).ap()
    expected = reference_ap(truth, results, iou_type)
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_copies_of_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=8)
    results = random_results(rng, truth)
    matches = CocoMatches.from_coco(as_coco(truth), results)
    counts = np.bincount(rng.integers(8, size=8), minlength=8)
    expected = reference_ap(*resampled(truth, results, counts))
    assert (counts == 0).any() and (counts > 1).any()
    np.testing.assert_allclose(matches.ap(counts), expected, rtol=0, atol=1e-12)


def test_more_than_a_hundred_detections_of_an_image_do_not_count() -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng, images=3, classes=1)
    results = random_results(rng, truth, extra=150)
    found = CocoMatches.from_coco(as_coco(truth), results).ap()
    np.testing.assert_allclose(found, reference_ap(truth, results), rtol=0, atol=1e-12)


def test_files_and_loaded_data_give_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng)
    results = random_results(rng, truth)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    before = copy.deepcopy(results)
    loaded = CocoMatches.from_coco(as_coco(truth), results)
    read = CocoMatches.from_coco(tmp_path / "truth.json", str(tmp_path / "results.json"))
    assert read.ap() == loaded.ap()
    assert results == before


def test_no_detections_are_zero_and_no_objects_are_nan() -> None:
    truth = random_truth(np.random.default_rng(0))
    matches = CocoMatches.from_coco(as_coco(truth), [])
    assert matches.ap() == (0.0, 0.0)
    assert np.isnan(matches.ap(np.zeros(12))).all()


def test_the_object_with_id_zero_can_be_found() -> None:
    truth = random_truth(np.random.default_rng(0), images=1, classes=1)
    truth["annotations"] = [{**truth["annotations"][0], "id": 0, "iscrowd": 0}]
    box = truth["annotations"][0]["bbox"]
    results = [{"image_id": 3, "category_id": 1, "bbox": box, "score": 0.5}]
    assert CocoMatches.from_coco(as_coco(truth), results).ap().ap == pytest.approx(1)


def test_weights_of_the_wrong_length_are_refused() -> None:
    matches = CocoMatches.from_coco(as_coco(random_truth(np.random.default_rng(0))), [])
    with pytest.raises(ValueError, match=r"\(5,\); expected \(12,\)"):
        matches.ap(np.ones(5))


def models(*, seed: int, quality: float) -> list[CocoMatches]:
    """Three models on the same 30 images."""
    rng = np.random.default_rng(seed)
    truth = random_truth(np.random.default_rng(0), images=30)
    runs = [random_results(rng, truth, quality=quality) for _ in range(3)]
    return [CocoMatches.from_coco(as_coco(truth), run) for run in runs]


class TestSampledAP:
    good = models(seed=5, quality=0.05)
    bad = models(seed=6, quality=0.25)

    def test_draws_are_weights_of_the_images(self) -> None:
        sampled = sample_ap(self.good, resamples=4, seed=7)
        assert sampled.per_seed == pytest.approx([100 * run.ap().ap for run in self.good])
        rng = np.random.default_rng(7)
        for row in sampled.resampled:
            counts = np.bincount(rng.integers(30, size=30), minlength=30)
            assert row == pytest.approx([100 * run.ap(counts).ap for run in self.good])
        assert sampled.image_ids == self.good[0].image_ids and sampled.draws == (4, 7)

    def test_a_clear_difference_excludes_zero_and_has_a_sign(self) -> None:
        bad, good = (sample_ap(runs, resamples=100) for runs in (self.bad, self.good))
        found = compare_arms(bad, good)
        plain = [100 * (g.ap().ap - b.ap().ap) for g, b in zip(self.good, self.bad, strict=True)]
        assert found.mean == pytest.approx(np.mean(plain))
        assert 0 < found.low < found.mean < found.high
        assert compare_arms(good, bad).low == pytest.approx(-found.high)
        assert found.p is not None and found.p < 0.05 and found.images == 30

    def test_an_arm_does_not_differ_from_itself(self) -> None:
        mixed = sample_ap([self.good[0], self.bad[1]], resamples=30)
        found = compare_arms(mixed, mixed)
        assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)

    def test_seeds_that_disagree_widen_the_interval(self) -> None:
        one_way = compare_arms(*(sample_ap(r[:1], resamples=100) for r in (self.bad, self.good)))
        # The second seed reverses the difference, so the interval has to reach both sides.
        arms = [self.bad[0], self.good[0]], [self.good[0], self.bad[0]]
        both_ways = compare_arms(*(sample_ap(runs, resamples=100) for runs in arms))
        assert one_way.low > 0
        assert both_ways.mean == 0
        assert both_ways.low < 0 < both_ways.high

    def test_progress_and_metric(self) -> None:
        calls: list[tuple[int, int]] = []
        sampled = sample_ap(
            self.good, metric="ap50", resamples=3, progress=lambda *c: calls.append(c)
        )
        assert calls == [(1, 3), (2, 3), (3, 3)]
        assert sampled.per_seed == pytest.approx([100 * run.ap().ap50 for run in self.good])

    def test_runs_that_do_not_belong_together_are_refused(self) -> None:
        truth = random_truth(np.random.default_rng(1), images=4)
        elsewhere = CocoMatches.from_coco(as_coco(truth), [])
        with pytest.raises(ValueError, match="found no runs"):
            sample_ap([])
        with pytest.raises(ValueError, match="different images"):
            sample_ap([self.good[0], elsewhere])


def test_single_classes_are_sampled_beside_their_mean() -> None:
    rng = np.random.default_rng(8)
    truth = random_truth(rng, images=10, classes=3)
    results = random_results(rng, truth)
    truth["categories"].append({"id": 99, "name": "nowhere"})
    found = sample_ap([CocoMatches.from_coco(as_coco(truth), results)], resamples=5)
    assert list(found.of_classes) == [1, 3, 5, 99]
    assert np.isnan(found.of_classes[99].per_seed).all()
    single = [found.of_classes[k] for k in (1, 3, 5)]
    assert np.mean([one.per_seed[0] for one in single]) == pytest.approx(found.per_seed[0])
    drawn = np.nanmean([one.resampled for one in single], axis=0)
    assert drawn == pytest.approx(found.resampled)
    for category, one in zip((1, 3, 5), single, strict=True):
        alone = {**truth, "categories": [c for c in truth["categories"] if c["id"] == category]}
        alone["annotations"] = [a for a in truth["annotations"] if a["category_id"] == category]
        own = [r for r in results if r["category_id"] == category]
        assert 100 * reference_ap(alone, own)[0] == pytest.approx(one.per_seed[0])
    loss = compare_arms(found.of_classes[1], found.of_classes[1])
    assert (loss.mean, loss.low, loss.high) == (0, 0, 0)
