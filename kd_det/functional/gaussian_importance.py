"""
Where a teacher predicts an object well: the importance masks of PGD.

Paper: Yang et al., "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022
(arXiv 2203.05469). For each ground-truth box:

    quality     q = [position inside the box] * p^(1 - xi) * IoU^xi
    selection   the K positions of highest q, all levels together
    fit         mu, Sigma = mean and covariance of the selected image points (maximum likelihood)
    importance  I = exp(-1/2 (X - mu)^T Sigma^-1 (X - mu)) at selected positions X, 0 elsewhere

with the teacher's probability p of the box's class and the overlap IoU of the teacher's box with
it; where several boxes select a position, the largest I counts. xi = 0.8 gives the classification
mask, 0.6 the regression mask.

The authors' release adds random jitter to the points and fits in float32. Here Sigma gets the
variance of that jitter as a ridge and the fit is float64: the masks are deterministic, and points
in one line give the exact one-dimensional Gaussian. Positions of zero quality are never selected.

`importance_of_box` is the method as written above, for one box. `importance_maps` gives the same
for a batch: it gathers the pairs of a box and a position that it may select, and no others, in
chunks of whole boxes; scores all pairs; and selects and fits for all boxes at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kd_det.functional._importance.pairs import (
    Pairs,
    flat_predictions,
    gather,
    present_objects,
    score,
)
from kd_det.functional._importance.selection import best_of_each
from kd_det.functional.boxes import aligned_iou, strictly_inside
from kd_det.functional.level_grid import Grid, count_positions, grid_positions
from kd_det.functional.precision import working_dtype

Gate = Literal["before", "after"]

# Variance of the release's jitter, uniform in +-0.05 px, in px^2.
RIDGE = 8.3e-4


@dataclass(frozen=True)
class ImportanceOptions:
    """
    What importance is, and how much of it is computed at a time.

    Args:
        exponents: xi of each map, in [0, 1]: classification 0.8 and regression 0.6 (paper).
        top_k: K, at least 1: positions selected for a box (paper: 30); fewer where fewer have a
            positive quality.
        gate: "before" selects among the positions inside the box (paper); "after" among all, and
            sets the weights of those outside to zero after the fit (release).
        ridge: see `gaussian_weights`.
        max_pairs: pairs of a box and a prediction that are built at a time, at about 200 bytes
            each; a chunk exceeds it by at most the predictions of one image.

    Raises:
        ValueError: a value is out of its range.
    """

    exponents: tuple[float, ...] = (0.8, 0.6)
    top_k: int = 30
    gate: Gate = "before"
    ridge: float = RIDGE
    max_pairs: int = 1 << 20

    def __post_init__(self) -> None:
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate is {self.gate!r}. Expected 'before' or 'after'.")
        if not all(0 <= exponent <= 1 for exponent in self.exponents):
            raise ValueError(f"exponents are {self.exponents}. Expected numbers from 0 to 1.")
        for name, low in (("top_k", 1), ("ridge", 0), ("max_pairs", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}. Expected at least {low}.")


DEFAULT_IMPORTANCE = ImportanceOptions()


def importance_of_box(
    probability: Tensor,
    boxes: Tensor,
    points: Tensor,
    box: Tensor,
    exponent: float,
    options: ImportanceOptions,
) -> Tensor:
    """
    Compute the importance of every position for one box, as the formulas say.

    Args:
        probability: the teacher's, of the box's class, (R, A).
        boxes: the teacher's decoded boxes, (R, A, 4).
        points: image points of the positions, (R, 2).
        box: the ground truth, (4,).
        exponent: xi.
        options: their own exponents are not looked at.

    Returns:
        (R,) in [0, 1], float64.
    """
    inside = strictly_inside(points, box)
    iou = aligned_iou(boxes, box)
    quality = prediction_quality(probability, iou, exponent).amax(1).nan_to_num(0.0)
    if options.gate == "before":
        quality = quality * inside
    best = quality.sort(descending=True, stable=True).indices[: options.top_k]
    weights = gaussian_weights(points[best], quality[best] > 0, options.ridge)
    if options.gate == "after":
        weights = weights * inside[best]
    return weights.new_zeros(len(points)).scatter(0, best, weights)


def prediction_quality(probability: Tensor, iou: Tensor, exponent: float) -> Tensor:
    """
    Weigh how well a prediction names an object against how well it encloses it (PGD, eq. 1).

    Args:
        probability: the teacher's probability of the object's class, in [0, 1].
        iou: overlap of the teacher's box with the object's, in [0, 1], of the same shape.
        exponent: xi in [0, 1]; 0 looks at the class alone, 1 at the box alone.

    Returns:
        probability^(1 - xi) * iou^xi.
    """
    return probability.pow(1 - exponent) * iou.pow(exponent)


def gaussian_weights(points: Tensor, selected: Tensor, ridge: float = RIDGE) -> Tensor:
    """
    Fit one Gaussian to each set of points and evaluate it there, without its normalising factor.

    Args:
        points: K image points (x, y) per set in pixels, (..., K, 2).
        selected: (..., K) bool; the other points take no part and get weight 0.
        ridge: added to both variances, in px^2; without any, points in one line give NaN.

    Returns:
        Weights in [0, 1], (..., K) float64. Without ridge, the K -2 log(weight) sum to 2 K.
    """
    # In float32 the determinant of points along a diagonal cancels to zero or below.
    points, weight = points.double(), selected.double()
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    x, y = (points * weight[..., None]).unbind(-1)
    x = (x - x.sum(-1, keepdim=True) / count) * weight
    y = (y - y.sum(-1, keepdim=True) / count) * weight
    xx = (x * x).sum(-1, keepdim=True) / count + ridge
    yy = (y * y).sum(-1, keepdim=True) / count + ridge
    xy = (x * y).sum(-1, keepdim=True) / count
    distance = (yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy)
    return torch.exp(-0.5 * distance).clamp(0, 1) * weight


@torch.no_grad()
def importance_maps(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_valid: Tensor,
    grids: Sequence[Grid],
    options: ImportanceOptions = DEFAULT_IMPORTANCE,
    *,
    position_valid: Tensor | None = None,
) -> list[Tensor]:
    """
    Compute the importance of every position of a batch, one map for each exponent.

    Args:
        logits: the teacher's class scores before the sigmoid, (N, R * A, K); the A predictions of a
            position follow each other, and the best of them counts.
        boxes: the teacher's decoded boxes in pixels, (N, R * A, 4).
        gt_boxes: (N, M, 4) corners in the same pixels, padded to the largest M of the batch. Best
            left on the CPU, as are the next two: their geometry decides the sizes of everything
            else, so from an accelerator they are fetched back.
        gt_classes: (N, M) int64 in 0..K-1; anything where not valid.
        gt_valid: (N, M) bool, False for padding.
        grids: of the R positions.
        options: what importance is.
        position_valid: (N, R) bool, False for positions on padding, which are never selected.

    Returns:
        One (N, R) map in [0, 1] for each exponent, float32 (float64 for float64 logits).

    Raises:
        ValueError: if predictions and positions do not match, or a class is out of range.
    """
    num_images, num_positions = logits.shape[0], count_positions(grids)
    predictions = flat_predictions(logits, boxes, position_valid, num_positions)
    objects = present_objects(
        gt_boxes, gt_classes, gt_valid, num_images=num_images, num_classes=logits.shape[2]
    )
    points = grid_positions(grids, logits.device)
    dtype = working_dtype(logits)
    maps = logits.new_zeros(len(options.exponents), num_images * num_positions, dtype=dtype)
    for pairs in gather(
        objects,
        grids,
        everywhere=options.gate == "after",
        max_pairs=max(1, options.max_pairs // predictions.num_anchors),
        device=logits.device,
        dtype=dtype,
    ):
        probability, iou = score(pairs, predictions)
        for importance, exponent in zip(maps, options.exponents, strict=True):
            quality = prediction_quality(probability, iou, exponent).amax(1)
            place, weight = _select_and_fit(pairs, quality, points, options)
            importance.scatter_reduce_(0, place.flatten(), weight.to(dtype).flatten(), "amax")
    return list(maps.unflatten(1, (num_images, num_positions)))


def _select_and_fit(
    pairs: Pairs, quality: Tensor, points: Tensor, options: ImportanceOptions
) -> tuple[Tensor, Tensor]:
    """Return the places in 0..N*R-1 that each box selects and their weights, (B, K) each."""
    pair, selected = best_of_each(quality, pairs.owner, pairs.counts, options.top_k)
    place = pairs.position[pair]
    chosen = points[place % len(points)]
    weight = gaussian_weights(chosen, selected, options.ridge)
    if options.gate == "after":
        weight = weight * strictly_inside(chosen, pairs.boxes[pairs.owner[pair]])
    return place, weight
