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

Only pairs of a box and a position that it may select are ever built, in chunks of whole boxes.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_det.functional.boxes import aligned_iou, strictly_inside
from kd_det.functional.level_grid import (
    Level,
    Runs,
    count_positions,
    grid_positions,
    runs_of_boxes,
    runs_of_everything,
    to_device,
)
from kd_det.functional.precision import working_dtype

Gate = Literal["before", "after"]

# Variance of the release's jitter, uniform in +-0.05 px, in px^2.
RIDGE = 8.3e-4


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
    levels: Sequence[Level],
    exponents: Sequence[float] = (0.8, 0.6),
    top_k: int = 30,
    gate: Gate = "before",
    ridge: float = RIDGE,
    position_valid: Tensor | None = None,
    max_pairs: int = 1 << 20,
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
        levels: the grids of the R positions.
        exponents: xi of each map; probability and IoU are computed once for all.
        top_k: K, positions selected for a box; fewer where fewer have a positive quality.
        gate: "before" selects among the positions inside the box (paper); "after" among all, and
            sets the weights of those outside to zero after the fit (release).
        ridge: see `gaussian_weights`.
        position_valid: (N, R) bool, False for positions on padding, which are never selected.
        max_pairs: pairs of a box and a prediction that are built at a time, at about 200 bytes
            each; a chunk exceeds it by at most R * A.

    Returns:
        One (N, R) map in [0, 1] for each exponent, float32 (float64 for float64 logits).

    Raises:
        ValueError: if predictions and positions do not match, a class is out of range, or `gate` is
            unknown.
    """
    num_images, num_positions = logits.shape[0], count_positions(levels)
    _check(logits, boxes, num_positions, gate)
    if not gt_boxes.shape[:2] == gt_classes.shape == gt_valid.shape or len(gt_valid) != num_images:
        raise ValueError(
            f"The ground truth has shapes {tuple(gt_boxes.shape)}, {tuple(gt_classes.shape)} and "
            f"{tuple(gt_valid.shape)}. Expected (N, M, 4), (N, M) and (N, M) for N = {num_images}."
        )
    image, slot = gt_valid.cpu().nonzero(as_tuple=True)
    objects, classes = gt_boxes.cpu()[image, slot], gt_classes.cpu()[image, slot]
    if len(classes) and not 0 <= classes.min() <= classes.max() < logits.shape[2]:
        raise ValueError(
            f"Ground-truth classes run from {classes.min()} to {classes.max()}, but the teacher "
            f"scores {logits.shape[2]}. Give teacher and student the same list of classes."
        )
    if gate == "before":
        runs = runs_of_boxes(levels, objects)
    else:
        runs = runs_of_everything(levels, len(objects))
    # Boxes that hold no position drop out; a position is now one of those of all images, 0..N*R-1.
    held, owner = torch.unique_consecutive(runs.owner, return_inverse=True)
    runs = Runs(owner, runs.first + image[runs.owner] * num_positions, runs.length)

    device, dtype = logits.device, working_dtype(logits)
    objects, classes = to_device(objects[held], device).to(dtype), to_device(classes[held], device)
    points = grid_positions(levels, device)
    num_anchors, num_classes = logits.shape[1] // num_positions, logits.shape[2]
    anchors = torch.arange(num_anchors, device=device)
    logits, boxes = logits.reshape(-1), boxes.reshape(-1, num_anchors * 4)
    maps = logits.new_zeros(len(exponents), num_images * num_positions, dtype=dtype)
    for chunk, counts in _chunks(runs, max(1, max_pairs // num_anchors)):
        owner, position = chunk.to(device).pairs(int(counts.sum()))
        counts = to_device(counts, device)
        # index_select: a third of the time of indexing with brackets, and this is most of it all.
        prediction = position[:, None] * num_anchors + anchors  # (P, A)
        place = prediction * num_classes + classes.index_select(0, owner)[:, None]
        probability = logits.take(place).to(dtype).sigmoid()
        if position_valid is not None:
            probability = probability * position_valid.take(position)[:, None]
        predicted = boxes.index_select(0, position).view(-1, num_anchors, 4).to(dtype)
        iou = aligned_iou(predicted, objects.index_select(0, owner)[:, None])
        for importance, exponent in zip(maps, exponents, strict=True):
            quality = prediction_quality(probability, iou, exponent).amax(1)
            pair, selected = _best_of_each(quality, owner, counts, top_k)
            place = position[pair]  # (B, K)
            weight = gaussian_weights(points[place % num_positions], selected, ridge)
            if gate == "after":
                inside = strictly_inside(points[place % num_positions], objects[owner[pair]])
                weight = weight * inside
            importance.scatter_reduce_(0, place.flatten(), weight.to(dtype).flatten(), "amax")
    return list(maps.unflatten(1, (num_images, num_positions)))


def _check(logits: Tensor, boxes: Tensor, num_positions: int, gate: str) -> None:
    if logits.shape[1] % num_positions or logits.shape[:2] != boxes.shape[:2]:
        raise ValueError(
            f"The teacher gives class scores of shape {tuple(logits.shape)} and boxes of shape "
            f"{tuple(boxes.shape)}. Expected (N, R * A, K) and (N, R * A, 4) for the "
            f"R = {num_positions} positions of the levels."
        )
    if gate not in ("before", "after"):
        raise ValueError(f"gate is {gate!r}. Expected 'before' or 'after'.")


def _chunks(runs: Runs, max_pairs: int) -> Iterator[tuple[Runs, Tensor]]:
    """Yield the runs of consecutive boxes, and the pairs of each of these boxes, (B,)."""
    num_boxes = int(runs.owner[-1]) + 1 if len(runs.owner) else 0
    counts = torch.zeros(num_boxes, dtype=torch.int64).index_add(0, runs.owner, runs.length)
    chunk = counts.cumsum(0) // max_pairs
    num_boxes_in, num_runs_in = (
        torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        for ids in (chunk, chunk[runs.owner])
    )
    parts = zip(*(tensor.split(num_runs_in) for tensor in runs), strict=True)
    yield from zip((Runs(*part) for part in parts), counts.split(num_boxes_in), strict=True)


def _best_of_each(
    quality: Tensor, owner: Tensor, counts: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """
    Find each box's pairs of highest quality; of equal ones the first.

    Args:
        quality: (P,) in [0, 1], ranked in float32.
        owner: box of each pair, ascending, (P,).
        counts: pairs of each box, at least 1, (B,).
        top_k: K.

    Returns:
        Pairs, (B, K), and which of them exist and have a positive quality, (B, K) bool.
    """
    # The bits of a non-negative float grow with its value, so that one sort of integers orders by
    # box, then by quality. NaN of a broken teacher would go first; as 0 it goes last.
    bits = quality.float().nan_to_num(0.0).view(torch.int32)
    order = torch.argsort((owner + 1 << 32) - bits, stable=True)
    slot = torch.arange(top_k, device=quality.device)
    pair = order[((counts.cumsum(0) - counts)[:, None] + slot).clamp(max=len(order) - 1)]
    return pair, (slot < counts[:, None]) & (quality[pair] > 0)
