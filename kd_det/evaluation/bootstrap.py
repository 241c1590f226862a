"""
Paired bootstrap of COCO AP: is one model better than another, or better on these images by chance?

Images are drawn with replacement (Efron, 1979), the same ones for both models, and so are the seeds
the models were trained with. Matching detections to objects does not depend on which images are
drawn, so it is done once; an image drawn n times then counts n times in the precision-recall curve:

    precision(i) = sum of weights of true positives up to i / sum of weights of detections up to i
    recall(i)    = sum of weights of true positives up to i / sum of weights of objects

over detections in order of score. Precision is made monotone from the right, read at 101 recalls.
Falling precision between two true positives never survives that, so only the rows of true
positives are kept, which makes an AP cost about a millisecond.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.evaluation.coco_index import index_pair

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StrPath = str | os.PathLike[str]


class AveragePrecision(NamedTuple):
    """AP over IoU 0.50 to 0.95, and at 0.50; 0 to 1, NaN if no image with weight has an object."""

    ap: float
    ap50: float


class _ClassMatches(NamedTuple):
    """Detections of one class by falling score, and which are true positives at each IoU."""

    objects: Ints  # (G,) image position of every object that counts
    detections: Ints  # (D,) image position of every detection
    positives: list[Ints]  # per IoU: positions among the D that are true positives
    ignored: list[Ints]  # per IoU: positions among the D that count neither way


class CocoMatches:
    """Detections on a data set, matched to the objects once, for AP under any image weights."""

    def __init__(
        self, image_ids: Sequence[int], classes: Sequence[_ClassMatches], recalls: Floats
    ) -> None:
        self.image_ids = tuple(image_ids)
        self._classes = tuple(classes)
        self._recalls = recalls

    @classmethod
    def from_coco(
        cls,
        truth: StrPath | COCO,
        results: StrPath | Sequence[Mapping[str, Any]],
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",
    ) -> "CocoMatches":
        """
        Match detections to objects with pycocotools, for all areas and 100 detections an image.

        Args:
            truth: annotation file in COCO format, or such a file loaded.
            results: detections in COCO's result format, as a file or a list. None of them is fine.
            iou_type: of boxes or of masks.
        """
        entries: Sequence[Mapping[str, Any]]
        if isinstance(results, (str, os.PathLike)):
            entries = json.loads(Path(results).read_text())
        else:
            entries = results
        dataset = truth.dataset if isinstance(truth, COCO) else json.loads(Path(truth).read_text())
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(*index_pair(COCO, dataset, entries, iou_type), iou_type)
            params = evaluation.params
            params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
            params.maxDets = [100]
            evaluation.evaluate()
        position = {image_id: i for i, image_id in enumerate(params.imgIds)}
        # Class by class, and within it image by image; None where an image has neither.
        per_class = np.array(evaluation.evalImgs, dtype=object).reshape(-1, len(position))
        classes = [
            _class_matches([e for e in row if e is not None], position, len(params.iouThrs))
            for row in per_class
        ]
        return cls([int(i) for i in params.imgIds], classes, params.recThrs)

    def ap(self, weights: ArrayLike | None = None) -> AveragePrecision:
        """
        Compute AP with every image counted as often as its weight says.

        Args:
            weights: (images,) in the order of `image_ids`, not negative; None counts each once.

        Returns:
            AP and AP50. With ones they are pycocotools'; with counts they are pycocotools' on a
            data set holding each image that many times (up to the order of different images'
            detections of exactly equal score).
        """
        given = np.ones(len(self.image_ids)) if weights is None else np.asarray(weights, np.float64)
        if given.shape != (len(self.image_ids),):
            raise ValueError(f"weights are {given.shape}; expected ({len(self.image_ids)},)")
        per_class = [
            _mean_precisions(matches, given, self._recalls)
            for matches in self._classes
            if given[matches.objects].any()
        ]
        if not per_class:
            return AveragePrecision(float("nan"), float("nan"))
        precisions = np.array(per_class)
        return AveragePrecision(float(precisions.mean()), float(precisions[:, 0].mean()))


def _class_matches(
    entries: list[dict[str, Any]], position: Mapping[int, int], num_ious: int
) -> _ClassMatches:
    def concatenate(parts: list[Any], dtype: type) -> Any:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(p, dtype) for p in parts)])

    def joined(key: str) -> Any:
        rows = [np.asarray(e[key]).reshape(num_ious, -1) != 0 for e in entries]
        return np.concatenate([np.zeros((num_ious, 0), bool), *rows], axis=1)

    places = [position[e["image_id"]] for e in entries]
    counted = [np.asarray(e["gtIgnore"]) == 0 for e in entries]
    objects = concatenate([np.full(c.sum(), i) for i, c in zip(places, counted, strict=True)], int)
    owners = [np.full(len(e["dtScores"]), i) for i, e in zip(places, entries, strict=True)]
    # Stable, as in pycocotools: equal scores stay in the order of images.
    order = np.argsort(-concatenate([e["dtScores"] for e in entries], float), kind="stable")
    matched, ignored = joined("dtMatches")[:, order], joined("dtIgnore")[:, order]
    return _ClassMatches(
        objects=objects,
        detections=concatenate(owners, int)[order],
        positives=[np.flatnonzero(row) for row in matched & ~ignored],
        ignored=[np.flatnonzero(row) for row in ignored],
    )


def _mean_precisions(matches: _ClassMatches, weights: Floats, recalls: Floats) -> list[float]:
    """Return the mean interpolated precision of one class at every IoU."""
    of_detection = weights[matches.detections]
    total = weights[matches.objects].sum()
    seen_by = np.cumsum(of_detection)
    out = []
    for positives, ignored in zip(matches.positives, matches.ignored, strict=True):
        true = np.cumsum(of_detection[positives])
        seen = seen_by[positives]
        if len(ignored):
            passed = np.concatenate([[0.0], np.cumsum(of_detection[ignored])])
            seen = seen - passed[np.searchsorted(ignored, positives)]
        precision = true / (seen + np.spacing(1))  # the same guard as in pycocotools
        # The best precision at this recall or a higher one; 0 beyond the last true positive.
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        out.append(float(envelope[np.searchsorted(true / total, recalls, side="left")].mean()))
    return out


def paired_bootstrap(
    baseline: Sequence[CocoMatches],
    other: Sequence[CocoMatches],
    *,
    metric: Literal["ap", "ap50"] = "ap",
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """
    Estimate the difference of AP between two models, and how sure it is.

    Args:
        baseline: one entry per training seed.
        other: the model compared, with the same seeds in the same order, on the same images.
        metric: "ap" or "ap50".
        resamples: how many times images and seeds are drawn.
        seed: of the drawing; equal arguments give equal results.
        confidence: of the interval, between 0 and 1.
        progress: called after every resample with the number done and the number in all.

    Returns:
        "mean", the difference other minus baseline on the images as they are, averaged over seeds;
        "low" and "high", the bounds of the percentile interval. In AP points, 0 to 100.

    Raises:
        ValueError: no seeds, or different numbers of them, or different images.
    """
    _check_pairs(baseline, other, confidence)
    num_images, num_seeds = len(baseline[0].image_ids), len(baseline)
    rng = np.random.default_rng(seed)

    def differences(weights: Floats | None, seeds: Sequence[int]) -> Floats:
        pairs = [(other[s].ap(weights), baseline[s].ap(weights)) for s in seeds]
        return 100 * np.array([getattr(a, metric) - getattr(b, metric) for a, b in pairs])

    drawn = np.empty(resamples)
    for i in range(resamples):
        images = rng.integers(num_images, size=num_images)
        weights = np.bincount(images, minlength=num_images).astype(np.float64)
        seeds, counts = np.unique(rng.integers(num_seeds, size=num_seeds), return_counts=True)
        drawn[i] = np.average(differences(weights, seeds.tolist()), weights=counts)
        if progress is not None:
            progress(i + 1, resamples)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    mean = differences(None, range(num_seeds)).mean()
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _check_pairs(
    baseline: Sequence[CocoMatches], other: Sequence[CocoMatches], confidence: float
) -> None:
    if len(baseline) != len(other) or not baseline:
        raise ValueError(
            f"found {len(baseline)} seeds of the baseline and {len(other)} of the other model; "
            "expected the same seeds of both, and at least one"
        )
    if len({matches.image_ids for matches in (*baseline, *other)}) > 1:
        raise ValueError("the models were evaluated on different images; evaluate them on the same")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
