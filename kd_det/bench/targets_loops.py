"""
The assignments of `kd_det.bench.targets_scene` as loops over images and boxes.

Written from the formulas, each step of a box for all positions at once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kd_det.bench.targets_scene import (
    BOX_FACTOR,
    CORE,
    EXPONENTS,
    IGNORE,
    IOU_THRESHOLDS,
    POINT_SCALE,
    TOPK,
    Assigned,
    cover,
)
from kd_det.functional.autoassign import center_prior
from kd_det.functional.boxes import aligned_giou, aligned_iou, box_centers, strictly_inside

_DDOD_MARGIN = 0.01
_MIN_COVER = 0.01


def atss(scene: Assigned) -> list[Tensor]:
    """See `targets_scene.atss`."""
    anchors = torch.cat(list(scene.anchors))
    matched = scene.points.new_full((2, len(anchors)), -1, dtype=torch.int64)
    best = scene.points.new_full((2, len(anchors)), -1.0)
    for number, image, box, _ in _objects(scene):
        index = _nearest(scene, box)
        iou = aligned_iou(anchors[index], box)
        _choose(matched[image], best[image], index, iou, scene.points, box, number, 0.0)
    row = (matched.flatten() >= 0).nonzero()[:, 0]
    return [row, scene.truth.boxes[matched.flatten()[row]]]


def ddod(scene: Assigned) -> list[Tensor]:
    """See `targets_scene.ddod`."""
    shape = (len(EXPONENTS), *scene.logits.shape[:2])
    matched = scene.points.new_full(shape, -1, dtype=torch.int64)
    best = scene.points.new_full(shape, -1.0)
    for number, image, box, label in _objects(scene):
        index = _nearest(scene, box)
        iou = aligned_iou(scene.boxes[image], box)
        probability = scene.logits[image, :, label].sigmoid()
        for i, xi in enumerate(EXPONENTS):
            quality = (probability ** (1 - xi) * iou**xi)[index]
            found = matched[i, image], best[i, image]
            _choose(*found, index, quality, scene.points, box, number, _DDOD_MARGIN)
    return [matched]


def reppoints(scene: Assigned) -> list[Tensor]:
    """See `targets_scene.reppoints`."""
    images, positions = scene.logits.shape[:2]
    matched = scene.points.new_full((2, images, positions), -1, dtype=torch.int64)
    nearest = scene.points.new_full((images, positions), math.inf)
    highest = scene.points.new_zeros(images, positions)
    tops = []
    for number, image, box, _ in _objects(scene):
        sides = box[2:] - box[:2]
        wanted = (sides / POINT_SCALE).log2().mean().trunc()
        gap = (scene.strides.log2() - wanted).abs()
        away = ((scene.points - box_centers(box)) / sides).square().sum(dim=1).sqrt()
        distance, index = away.where(gap == gap.min(), math.inf).min(dim=0)
        closer = distance < nearest[image, index]
        matched[0, image, index] = torch.where(closer, number, matched[0, image, index])
        nearest[image, index] = torch.minimum(distance, nearest[image, index])

        iou = aligned_iou(scene.boxes[image], box)
        better = iou > highest[image]
        matched[1, image] = torch.where(better, number, matched[1, image])
        highest[image] = torch.maximum(iou, highest[image])
        tops.append((number, image, (iou == iou.max()) & (iou > 0)))
    low, high = IOU_THRESHOLDS
    matched[1] = matched[1].where(highest >= high, -2).where(highest >= low, -1)
    for number, image, top in tops:
        matched[1, image] = torch.where(top, number, matched[1, image])
    return [matched]


def autoassign(scene: Assigned) -> list[Tensor]:
    """See `targets_scene.autoassign`."""
    overlap = scene.points.new_zeros(scene.logits.shape[:2])
    for _, image, box, _ in _objects(scene):
        overlap[image] = torch.maximum(overlap[image], aligned_iou(scene.boxes[image], box))
    terms, weights = [], torch.ones_like(scene.logits)
    for _, image, box, label in _objects(scene):
        inside = strictly_inside(scene.points, box).nonzero()[:, 0]
        if len(inside) == 0:
            terms.append(scene.points.new_zeros(()))
            continue
        mean = scene.points.new_zeros(2)
        prior = center_prior(scene.points[inside], scene.strides[inside], box, mean, mean + 1)
        giou = aligned_giou(scene.boxes[image, inside], box)
        confidence = scene.logits[image, inside, label].sigmoid()
        confidence = confidence * (-BOX_FACTOR * (1 - giou)).exp()
        weight = (3 * confidence).exp() * prior
        terms.append(-((weight * confidence).sum() / weight.sum()).log())
        value = 1 / (1 - overlap[image, inside]).clamp(min=1e-12)
        spread = value.max() - value.min()
        share = (value - value.min() + 1e-12) / (spread + 1e-12)
        weights[image, inside, label] = torch.minimum(weights[image, inside, label], 1 - share)
    return [torch.stack(terms), weights.flatten(0, 1)]


def fsaf(scene: Assigned) -> list[Tensor]:
    """See `targets_scene.fsaf`."""
    images, positions = scene.logits.shape[:2]
    owner = scene.points.new_full((images, positions), -1, dtype=torch.int64)
    weights = torch.ones_like(scene.logits)
    objects = list(_objects(scene))
    regions = {}
    # Smaller boxes take positions from them.
    for number, image, box, _ in sorted(
        objects, key=lambda x: -float((x[2][2:] - x[2][:2]).prod())
    ):
        core = strictly_inside(scene.points, box) & (cover(scene, box, CORE) > _MIN_COVER)
        regions[number] = core | (cover(scene, box, IGNORE) > _MIN_COVER)
        owner[image, core] = number
    for number, image, _, label in objects:
        weights[image, regions[number] & (owner[image] != number), label] = 0
    losses = scene.losses.view(images, positions)
    for number, image, _, label in objects:
        mine = owner[image] == number
        positive = mine & (weights[image, :, label] > 0)
        counts = [positive & (scene.level == i) for i in range(len(scene.anchors))]
        means = torch.stack([losses[image, x].mean().nan_to_num(math.inf) for x in counts])
        dropped = positive & (scene.level != means.argmin())
        weights[image, dropped, label] = 0
        owner[image, dropped | (mine & ~positive)] = -1
    return [owner.flatten(), weights.flatten(0, 1)]


def _objects(scene: Assigned) -> Iterator[tuple[int, int, Tensor, int]]:
    """Return number, image, box and class of every object."""
    number = 0
    for image, own in enumerate(scene.instances):
        for box, label in zip(own.gt_boxes.tensor, own.gt_classes.tolist(), strict=True):
            yield number, image, box, label
            number += 1


def _nearest(scene: Assigned, box: Tensor) -> Tensor:
    """Return the candidates of a box: of every level the nearest positions."""
    away = (scene.points - box_centers(box)).square().sum(dim=1)
    found, start = [], 0
    for level in scene.anchors:
        part = away[start : start + len(level)]
        found.append(part.topk(min(TOPK, len(level)), largest=False).indices + start)
        start += len(level)
    return torch.cat(found)


def _choose(
    matched: Tensor,
    best: Tensor,
    index: Tensor,
    value: Tensor,
    points: Tensor,
    box: Tensor,
    number: int,
    margin: float,
) -> None:
    """Give those candidates to a box that are good enough and that no other values more."""
    positive = value + 1e-6 >= value.mean() + value.std()
    positive &= strictly_inside(points[index], box, margin) & (value > best[index])
    chosen = index[positive]
    matched[chosen] = number
    best[chosen] = value[positive]
