"""
Detections matched to objects at one IoU, with what is needed to say why a detection is wrong.

Matching is COCO's: within an image and a class, detections in order of score take the free object
they overlap most, if by the threshold or more. What then lies on a crowd region counts neither way.

D detections, G objects (crowd regions are none), over all images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MOST = 100  # detections of an image and a class that COCO looks at


@dataclass(frozen=True)
class Objects:
    """
    Objects of a test set as arrays.

    Args:
        image_ids: of all images; `image` counts in this order.
        category_ids: of all classes; `label` counts in this order.
        image, label: (G,) of every object.
        boxes: (G, 4) x y width height.
        crowds: per image the crowd regions, (M, 4), and their labels (M,).
        by_image: per image the positions of its objects among the G.
    """

    image_ids: tuple[Any, ...]
    category_ids: tuple[int, ...]
    image: Ints
    label: Ints
    boxes: Floats
    crowds: Mapping[int, tuple[Floats, Ints]]
    by_image: tuple[Ints, ...]

    @classmethod
    def from_coco(cls, coco: Mapping[str, Any]) -> "Objects":
        """Take the content of an annotation file in COCO format."""
        image_ids = tuple(image["id"] for image in coco["images"])
        categories = tuple(sorted(item["id"] for item in coco["categories"]))
        place = {image_id: i for i, image_id in enumerate(image_ids)}
        label = {category: i for i, category in enumerate(categories)}
        crowd = [a for a in coco["annotations"] if a.get("iscrowd")]
        single = [a for a in coco["annotations"] if not a.get("iscrowd")]
        image = np.array([place[a["image_id"]] for a in single], np.int64)
        regions: dict[int, list[Mapping[str, Any]]] = {}
        for item in crowd:
            regions.setdefault(place[item["image_id"]], []).append(item)
        return cls(
            image_ids=image_ids,
            category_ids=categories,
            image=image,
            label=np.array([label[a["category_id"]] for a in single], np.int64),
            boxes=_boxes(single),
            crowds={
                i: (_boxes(items), np.array([label[a["category_id"]] for a in items], np.int64))
                for i, items in regions.items()
            },
            by_image=tuple(_groups(image, len(image_ids))),
        )


@dataclass(frozen=True)
class Matches:
    """
    One run's detections on a test set, image by image and by falling score within an image.

    Args:
        test_set: what they were matched to.
        image, label, score: (D,) of every detection.
        boxes: (D, 4) x y width height.
        target: (D,) the object it is a match of, -1 where it is none.
        counted: (D,) False where it lies on a crowd region, and so is no mistake.
        same, same_object: (D,) highest IoU with an object of its class, and which; 0 and -1 without
            any.
        other, other_object: (D,) the same with objects of other classes.
    """

    test_set: Objects
    image: Ints
    label: Ints
    score: Floats
    boxes: Floats
    target: Ints
    counted: Bools
    same: Floats
    same_object: Ints
    other: Floats
    other_object: Ints

    @property
    def found(self) -> Bools:
        """Objects that a detection is a match of, (G,)."""
        found = np.zeros(len(self.test_set.image), bool)
        found[self.target[self.target >= 0]] = True
        return found


def match(
    test_set: Objects, detections: Sequence[Mapping[str, Any]], *, iou: float = 0.5
) -> Matches:
    """
    Match detections to objects.

    Args:
        test_set: the objects.
        detections: in COCO's result format; none of them is fine.
        iou: threshold, above 0 and at most 1.
    """
    place = {image_id: i for i, image_id in enumerate(test_set.image_ids)}
    labels = {category: i for i, category in enumerate(test_set.category_ids)}
    known = [d for d in detections if d["image_id"] in place and d["category_id"] in labels]
    image = np.array([place[d["image_id"]] for d in known], np.int64)
    label = np.array([labels[d["category_id"]] for d in known], np.int64)
    score = np.array([d["score"] for d in known], np.float64)
    boxes = _boxes(known)
    order = np.lexsort((-score, image))
    order = order[_rank_in_class(image[order], label[order]) < _MOST]
    image, label, score, boxes = image[order], label[order], score[order], boxes[order]
    count = len(order)
    out = Matches(
        test_set=test_set,
        image=image,
        label=label,
        score=score,
        boxes=boxes,
        target=np.full(count, -1),
        counted=np.ones(count, bool),
        same=np.zeros(count),
        same_object=np.full(count, -1),
        other=np.zeros(count),
        other_object=np.full(count, -1),
    )
    for i, rows in enumerate(_groups(image, len(test_set.image_ids))):
        if len(rows):
            _match_image(out, i, rows, iou)
    return out


def _match_image(out: Matches, image: int, rows: Ints, iou: float) -> None:
    """Fill in the rows of one image."""
    test_set = out.test_set
    objects = test_set.by_image[image]
    if len(objects):
        overlaps = _overlaps(out.boxes[rows], test_set.boxes[objects], crowd=False)
        own_class = out.label[rows][:, None] == test_set.label[objects]
        for of_class, best, which in (
            (own_class, out.same, out.same_object),
            (~own_class, out.other, out.other_object),
        ):
            among = np.where(of_class, overlaps, 0.0)
            best[rows] = among.max(axis=1)
            which[rows] = np.where(best[rows] > 0, objects[among.argmax(axis=1)], -1)
        out.target[rows] = _take_in_turn(np.where(own_class, overlaps, 0.0), objects, iou)
    if image in test_set.crowds:
        regions, labels = test_set.crowds[image]
        inside = _overlaps(out.boxes[rows], regions, crowd=True) >= iou
        on_crowd = (inside & (out.label[rows][:, None] == labels)).any(axis=1)
        out.counted[rows] = ~on_crowd | (out.target[rows] >= 0)


def _take_in_turn(overlaps: Floats, objects: Ints, iou: float) -> Ints:
    """Return per detection, in order, the free object that it overlaps most, or -1."""
    taken = np.full(len(overlaps), -1)
    free = overlaps.copy()
    for row in np.flatnonzero((overlaps >= iou).any(axis=1)):
        best = int(free[row].argmax())
        if free[row, best] >= iou:
            taken[row] = objects[best]
            free[:, best] = 0.0
    return taken


def _overlaps(boxes: Floats, others: Floats, *, crowd: bool) -> Floats:
    """Return IoU of (D, 4) and (G, 4) x y width height; of a crowd, over the detection's area."""
    found: Floats = np.asarray(coco_mask.iou(boxes, others, [crowd] * len(others)))
    return found.reshape(len(boxes), len(others))


def _rank_in_class(image: Ints, label: Ints) -> Ints:
    """Return each detection's place among those of its image and class, which are in order."""
    order = np.lexsort((np.arange(len(image)), label, image))
    new = np.ones(len(image), bool)
    sorted_image, sorted_label = image[order], label[order]
    new[1:] = (sorted_image[1:] != sorted_image[:-1]) | (sorted_label[1:] != sorted_label[:-1])
    starts = np.flatnonzero(new)
    rank = np.arange(len(image)) - np.repeat(starts, np.diff(np.append(starts, len(image))))
    out = np.empty(len(image), np.int64)
    out[order] = rank
    return out


def _groups(values: Ints, count: int) -> list[Ints]:
    """Return for each of 0 to count - 1 the positions that hold it, in order."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.searchsorted(values[order], np.arange(1, count)))


def _boxes(entries: Sequence[Mapping[str, Any]]) -> Floats:
    return np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
