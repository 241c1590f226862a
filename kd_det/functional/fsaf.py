"""
FSAF (Zhu, He, Savvides, "Feature Selective Anchor-Free Module for Single-Shot Object Detection",
CVPR 2019): which positions are positive, and on which level.

    cover_jg(e) = area(cell of j with box g shrunk to e times its sides) / area(cell of j)
    core_jg     = j inside g and cover_jg(core) > min_cover      a positive of the smallest such g
    shadow_jg   = cover_jg(ignore) > min_cover, and no core      neither: its class is ignored there
    level of g  = where the mean loss of its positives is smallest; on other levels they are ignored

What is ignored is a class at a position, which stays a negative of the other classes. Pairs (j, g)
of all images stand in flat lists of P entries; Q positions in all, those of every image.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.boxes import box_centers, strictly_inside


class Pairs(NamedTuple):
    """
    Positions in the core or the shadow of boxes.

    Args:
        box: (P,) int64 in [0, G).
        position: (P,) int64 in [0, R), of an image.
        core: (P,) bool, else shadow.
    """

    box: Tensor
    position: Tensor
    core: Tensor


class Labels(NamedTuple):
    """
    What pairs and classes say of the batch's positions.

    Args:
        positive: (P,) bool, the pairs whose position has that box to predict.
        weights: (Q, K) float in {0, 1}, 0 where a class is ignored.
    """

    positive: Tensor
    weights: Tensor


@torch.no_grad()
def find_pairs(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    *,
    core: float = 0.2,
    ignore: float = 0.2,
    min_cover: float = 0.01,
) -> Pairs:
    """
    Find the cores and shadows of all boxes on all levels: there are no size ranges.

    Args:
        points: (R, 2) x and y in pixels, each the middle of a square cell.
        strides: (R,) sides of the cells in pixels.
        boxes: (G, 4) corners in pixels.
        core, ignore: what boxes shrink to, as a fraction of their sides.
        min_cover: fraction of the cell that a shrunk box must cover more than.

    Returns:
        The pairs, box by box; the device is waited for once.
    """
    near = _cover(points, strides, boxes, ignore) > min_cover
    inner = _cover(points, strides, boxes, core) > min_cover
    inner &= strictly_inside(points, boxes[:, None])
    box, position = (near | inner).nonzero(as_tuple=True)
    return Pairs(box, position, inner[box, position])


@torch.no_grad()
def label_pairs(
    pairs: Pairs,
    row: Tensor,
    boxes: Tensor,
    classes: Tensor,
    like: Tensor,
    *,
    foreground_dominates: bool = False,
) -> Labels:
    """
    Give each position to the smallest box whose core it is in; ignore the classes of the others.

    Args:
        pairs: of the batch.
        row: (P,) int64, where each pair's position is in `like`.
        boxes: (G, 4) corners in pixels; of boxes of one area the first comes before the others.
        classes: (P,) int64 in [0, K), of each pair's box.
        like: (Q, K), of which shape and type are read.
        foreground_dominates: a position whose own class another box wants ignored stays positive;
            by default it does not, and its class is ignored.

    Returns:
        The labels.
    """
    count = len(boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rank = area.argsort(stable=True).argsort()[pairs.box]
    contender = rank.where(pairs.core, count)
    first = rank.new_full((len(like),), count).scatter_reduce(0, row, contender, "amin")
    wins = pairs.core & (rank == first[row])
    weights = torch.ones_like(like)
    index = row * like.shape[1] + classes
    flat = weights.view(-1)
    flat.scatter_reduce_(0, index, wins.to(like.dtype), "amin")
    if foreground_dominates:
        flat.scatter_reduce_(0, index, wins.to(like.dtype), "amax")
    return Labels(wins & (flat[index] > 0), weights)


@torch.no_grad()
def select_levels(
    loss: Tensor, positive: Tensor, box: Tensor, level: Tensor, shape: tuple[int, int]
) -> Tensor:
    """
    Keep the positives on the level that predicts their box best.

    Args:
        loss: (P,) of each pair.
        positive: (P,) bool.
        box: (P,) int64 in [0, G).
        level: (P,) int64 in [0, L), from fine to coarse.
        shape: G and L.

    Returns:
        (P,) bool, the positives that stay: those of a box on the level where their mean loss is
        smallest, of equal ones the finest.
    """
    place = box * shape[1] + level
    sums = loss.new_zeros(2, shape[0] * shape[1])
    sums.index_add_(1, place, torch.stack([loss.where(positive, 0), positive.to(loss.dtype)]))
    mean = (sums[0] / sums[1]).where(sums[1] > 0, math.inf)
    return positive & (level == mean.view(shape).argmin(dim=1)[box])


@torch.no_grad()
def ignore(weights: Tensor, row: Tensor, classes: Tensor, chosen: Tensor) -> Tensor:
    """
    Ignore more classes.

    Args:
        weights: (Q, K).
        row: (P,) int64 in [0, Q).
        classes: (P,) int64 in [0, K).
        chosen: (P,) bool, the pairs whose class is to be ignored at their position.

    Returns:
        (Q, K), the weights with 0 there.
    """
    index = row * weights.shape[1] + classes
    flat = weights.flatten().scatter_reduce(0, index, (~chosen).to(weights.dtype), "amin")
    return flat.view_as(weights)


def _cover(points: Tensor, strides: Tensor, boxes: Tensor, shrink: float) -> Tensor:
    """Return (G, R): how much of each cell a shrunk box covers, in [0, 1]."""
    half = (boxes[:, 2:] - boxes[:, :2]) * (shrink / 2)
    low, high = box_centers(boxes) - half, box_centers(boxes) + half
    sides = [
        torch.minimum(points[:, a] + strides / 2, high[:, a, None])
        - torch.maximum(points[:, a] - strides / 2, low[:, a, None])
        for a in range(2)
    ]
    return sides[0].clamp(min=0) * sides[1].clamp(min=0) / strides.square()
