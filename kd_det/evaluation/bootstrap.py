"""
How far COCO AP depends on the test images: AP on images drawn with replacement (Efron, 1979).

Matching detections to objects does not depend on which images are drawn, so it is done once; an
image drawn n times then counts n times in the precision-recall curve:

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
from dataclasses import dataclass, field, replace
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
_NUM_IOUS = 10  # 0.50 to 0.95


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
        self,
        image_ids: Sequence[int],
        category_ids: Sequence[int],
        classes: Sequence[_ClassMatches],
        recalls: Floats,
    ) -> None:
        self.image_ids = tuple(image_ids)
        self.category_ids = tuple(category_ids)
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
        categories = [int(i) for i in params.catIds]
        return cls([int(i) for i in params.imgIds], categories, classes, params.recThrs)

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
        found = self.precisions(weights)
        found = found[~np.isnan(found[:, 0])]
        if not len(found):
            return AveragePrecision(float("nan"), float("nan"))
        return AveragePrecision(float(found.mean()), float(found[:, 0].mean()))

    def precisions(self, weights: ArrayLike | None = None) -> Floats:
        """
        Compute the AP of every class at every IoU; arguments as for `ap`.

        Returns:
            (classes, IoUs), 0 to 1; NaN for a class of which no image with weight has an object.
        """
        given = np.ones(len(self.image_ids)) if weights is None else np.asarray(weights, np.float64)
        if given.shape != (len(self.image_ids),):
            raise ValueError(f"weights are {given.shape}; expected ({len(self.image_ids)},)")
        none = [float("nan")] * _NUM_IOUS
        return np.array(
            [
                _mean_precisions(matches, given, self._recalls)
                if given[matches.objects].any()
                else none
                for matches in self._classes
            ]
        ).reshape(-1, _NUM_IOUS)


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


@dataclass(frozen=True)
class SampledAP:
    """AP of one arm in AP points (0 to 100), on the test images and on draws of them.

    Args:
        image_ids: of the test set, in order.
        per_seed: (n,) AP of every training seed on the images as they are.
        resampled: (resamples, n) AP on the images of every draw; NaN without an object.
        draws: how many draws, and the random seed they come from.
        of_classes: the same of single classes, by category id.
    """

    image_ids: tuple[int, ...]
    per_seed: Floats
    resampled: Floats
    draws: tuple[int, int]
    of_classes: Mapping[int, "SampledAP"] = field(default_factory=dict)


def sample_ap(
    runs: Sequence[CocoMatches],
    *,
    metric: Literal["ap", "ap50"] = "ap",
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SampledAP:
    """
    Compute an arm's AP on the test images, and on as many drawn from them with replacement.

    Args:
        runs: one entry per training seed, on the same images.
        metric: "ap" or "ap50".
        resamples: how many times the images are drawn; the same ones for all seeds.
        seed: of the drawing. Equal seeds draw equal images for every arm on this test set.
        progress: called after every draw with the number done and the number in all.

    Raises:
        ValueError: no runs, or runs on different images.
    """
    if not runs:
        raise ValueError("found no runs; expected one for each training seed, at least one")
    if len({matches.image_ids for matches in runs}) > 1:
        raise ValueError("the seeds were evaluated on different images; evaluate them on the same")
    num_images = len(runs[0].image_ids)
    rng = np.random.default_rng(seed)
    ious = slice(None) if metric == "ap" else slice(1)

    def points(weights: Floats | None) -> Floats:
        """Return AP of all classes together, and of each; (n, 1 + classes)."""
        found = [matches.precisions(weights)[:, ious] for matches in runs]
        together = [_mean(one[~np.isnan(one[:, 0])]) for one in found]
        single = np.array([one.mean(axis=1) for one in found])
        return 100 * np.concatenate([np.array(together)[:, None], single], axis=1)

    given = points(None)
    resampled = np.empty((resamples, *given.shape))
    for i in range(resamples):
        images = rng.integers(num_images, size=num_images)
        resampled[i] = points(np.bincount(images, minlength=num_images).astype(np.float64))
        if progress is not None:
            progress(i + 1, resamples)

    def column(place: int) -> SampledAP:
        per_seed, drawn = given[:, place], resampled[:, :, place]
        return SampledAP(runs[0].image_ids, per_seed, drawn, (resamples, seed))

    by_class = {category: column(1 + k) for k, category in enumerate(runs[0].category_ids)}
    return replace(column(0), of_classes=by_class)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
