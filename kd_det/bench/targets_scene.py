"""
What the benchmark of assignments measures: scenes, and the assignments as the detectors make them.

`kd_det.bench.targets` is the benchmark itself, `kd_det.bench.targets_loops` what it compares with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from kd_det.bench.pgd_scene import Scene
from kd_det.functional.autoassign import (
    center_prior,
    foreground_share,
    negative_weights,
    pairs_inside,
    positive_terms,
)
from kd_det.functional.boxes import aligned_giou, box_centers
from kd_det.functional.ddod import assign_by_quality, prediction_qualities
from kd_det.functional.fsaf import find_pairs, ignore, label_pairs, select_levels
from kd_det.functional.level_grid import Grid, grid_positions
from kd_det.functional.reppoints import assign_by_overlap, assign_nearest
from kd_det.modeling.dense.atss_assigner import find_positives
from kd_det.modeling.dense.autoassign import best_overlap
from kd_det.modeling.dense.ground_truth import GroundTruth
from kd_det.modeling.dense.matching import join_images

# The detectors' defaults.
ANCHOR_SCALE, TOPK, EXPONENTS = 8, 9, (0.8, 0.5)
POINT_SCALE, IOU_THRESHOLDS = 4.0, (0.4, 0.5)
CORE, IGNORE = 0.2, 0.2
BOX_FACTOR = 5.0


class Assigned(NamedTuple):
    """
    A batch of two images whose G objects are to be assigned, on one device.

    Args:
        logits, boxes: predictions, (2, R, K) and (2, R, 4).
        losses: (2 * R,) what each position costs.
        points: (R, 2) positions.
        strides: (R,) of their levels.
        level: (R,) their numbers, from fine to coarse.
        anchors: per level, squares of 8 strides, (R_l, 4).
        instances: the objects of each image.
        truth: the same, flat.
    """

    logits: Tensor
    boxes: Tensor
    losses: Tensor
    points: Tensor
    strides: Tensor
    level: Tensor
    anchors: Sequence[Tensor]
    instances: list[Instances]
    truth: GroundTruth

    @classmethod
    def random(
        cls, grids: Sequence[Grid], size: tuple[int, int], count: int, device: str
    ) -> "Assigned":
        """Draw predictions and M objects an image, as `Scene.random` does."""
        scene = Scene.random(grids, size, count, device)
        points = grid_positions(grids, device).float()
        cells = [grid.height * grid.width for grid in grids]
        level = torch.arange(len(grids)).repeat_interleave(torch.tensor(cells)).to(device)
        strides = torch.tensor([float(grid.stride) for grid in grids], device=device)[level]
        half = ANCHOR_SCALE / 2 * strides[:, None]
        anchors = torch.cat([points - half, points + half], dim=1)
        instances = [
            Instances(size, gt_boxes=Boxes(boxes.to(device)), gt_classes=classes.to(device))
            for boxes, classes in zip(scene.gt_boxes, scene.gt_classes, strict=True)
        ]
        return cls(
            logits=scene.logits,
            boxes=scene.boxes,
            losses=scene.logits.flatten(0, 1)[:, 0].exp(),
            points=points,
            strides=strides,
            level=level,
            anchors=anchors.split(cells),
            instances=instances,
            truth=GroundTruth.of(instances),
        )


def atss(scene: Assigned) -> list[Tensor]:
    """Return the rows of all positives, (P,), and their boxes, (P, 4)."""
    found = find_positives(
        scene.anchors,
        [x.gt_boxes.tensor for x in scene.instances],
        [x.gt_classes for x in scene.instances],
        topk=TOPK,
    )
    return [found.index, found.boxes]


def autoassign(scene: Assigned) -> list[Tensor]:
    """Return what each box scores, (G,), and how much positions are negatives, (2 * R, K)."""
    truth, count = scene.truth, len(scene.truth.boxes)
    box, position = pairs_inside(scene.points, truth.boxes)
    targets, classes = truth.boxes[box], truth.classes[box]
    row = truth.image[box] * len(scene.points) + position
    mean = scene.points.new_zeros(len(box), 2)
    prior = center_prior(scene.points[position], scene.strides[position], targets, mean, mean + 1)
    fit = (-BOX_FACTOR * (1 - aligned_giou(scene.boxes.flatten(0, 1)[row], targets))).exp()
    confidence = scene.logits.flatten(0, 1)[row, classes].sigmoid() * fit
    share = foreground_share(best_overlap(scene.boxes, scene.instances)[row], box, count)
    return [
        positive_terms(confidence, prior, box, count),
        negative_weights(share, row, classes, scene.logits.flatten(0, 1)),
    ]


def ddod(scene: Assigned) -> list[Tensor]:
    """Return the object of each position, (2, 2, R), for classes and for boxes."""
    matches = []
    for logits, boxes, own in zip(scene.logits, scene.boxes, scene.instances, strict=True):
        objects = own.gt_boxes.tensor
        qualities = prediction_qualities(logits, boxes, objects, own.gt_classes, EXPONENTS)
        found = [
            assign_by_quality(scene.anchors, objects, quality, assigner="atss", topk=TOPK)
            for quality in qualities
        ]
        matches.append(torch.stack(found))
    return [join_images(matches, [len(x) for x in scene.instances])]


def reppoints(scene: Assigned) -> list[Tensor]:
    """Return the object of each position, (2, 2, R), for first and for refined points."""
    matches = []
    for boxes, own in zip(scene.boxes, scene.instances, strict=True):
        objects = own.gt_boxes.tensor
        nearest = assign_nearest(scene.points, scene.strides, objects, POINT_SCALE)
        overlapping = assign_by_overlap(boxes, objects, *IOU_THRESHOLDS)
        matches.append(torch.stack([nearest, overlapping]))
    return [join_images(matches, [len(x) for x in scene.instances])]


def fsaf(scene: Assigned) -> list[Tensor]:
    """Return the object of each position, (2 * R,), and which classes count, (2 * R, K)."""
    truth, like = scene.truth, scene.logits.flatten(0, 1)
    pairs = find_pairs(scene.points, scene.strides, truth.boxes, core=CORE, ignore=IGNORE)
    row = truth.image[pairs.box] * len(scene.points) + pairs.position
    classes = truth.classes[pairs.box]
    labels = label_pairs(pairs, row, truth.boxes, classes, like)
    shape = len(truth.boxes), len(scene.anchors)
    level = scene.level[pairs.position]
    kept = select_levels(scene.losses[row], labels.positive, pairs.box, level, shape)
    owner = row.new_full((len(like),), -1)
    owner[row[kept]] = pairs.box[kept]
    return [owner, ignore(labels.weights, row, classes, labels.positive & ~kept)]


def cover(scene: Assigned, box: Tensor, shrink: float) -> Tensor:
    """Return (R,): how much of each cell a shrunk box (4,) covers, in [0, 1]."""
    half = (box[2:] - box[:2]) * shrink / 2
    middle, reach = box_centers(box), scene.strides[:, None] / 2
    low = torch.maximum(scene.points - reach, middle - half)
    high = torch.minimum(scene.points + reach, middle + half)
    return (high - low).clamp(min=0).prod(dim=1) / scene.strides.square()
