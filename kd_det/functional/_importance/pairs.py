"""
Pairs of a ground-truth box and a position that it may select: gathered, then scored.

The ground truth stays on the CPU until the number of pairs is known, so that no accelerator has to
be asked for a size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional._importance.runs import (
    Runs,
    chunks_of_boxes,
    runs_of_boxes,
    runs_of_everything,
)
from kd_det.functional.boxes import aligned_iou
from kd_det.functional.level_grid import Grid, count_positions, to_device
from kd_det.functional.precision import working_dtype


class Objects(NamedTuple):
    """The B ground-truth boxes of a batch, without padding."""

    image: Tensor  # index of each box's image, (B,)
    boxes: Tensor  # (B, 4)
    classes: Tensor  # (B,)


class Pairs(NamedTuple):
    """P pairs, ordered by box, of some of the boxes that hold a position."""

    owner: Tensor  # box of each pair, (P,), an index into the next two
    boxes: Tensor  # (B, 4), of all chunks
    classes: Tensor  # (B,)
    position: Tensor  # position of each pair among those of all images, 0..N*R-1, (P,)
    counts: Tensor  # pairs of each box of this chunk


class Predictions(NamedTuple):
    """A teacher's predictions for a batch, laid out to be picked by position."""

    logits: Tensor  # (N * R * A * K,)
    boxes: Tensor  # (N * R, A * 4)
    num_anchors: int  # A
    num_classes: int  # K
    valid: Tensor | None  # (N, R) bool


def flat_predictions(
    logits: Tensor, boxes: Tensor, valid: Tensor | None, num_positions: int
) -> Predictions:
    """
    Lay out (N, R * A, K) class scores and (N, R * A, 4) boxes.

    Raises:
        ValueError: they do not match the positions.
    """
    if logits.shape[1] % num_positions or logits.shape[:2] != boxes.shape[:2]:
        raise ValueError(
            f"The teacher gives class scores of shape {tuple(logits.shape)} and boxes of shape "
            f"{tuple(boxes.shape)}. Expected (N, R * A, K) and (N, R * A, 4) for the "
            f"R = {num_positions} positions of the levels."
        )
    num_anchors = logits.shape[1] // num_positions
    return Predictions(
        logits.reshape(-1), boxes.reshape(-1, num_anchors * 4), num_anchors, logits.shape[2], valid
    )


def present_objects(
    boxes: Tensor, classes: Tensor, valid: Tensor, *, num_images: int, num_classes: int
) -> Objects:
    """
    Take the boxes that are no padding, to the CPU.

    Args:
        boxes: (N, M, 4).
        classes: (N, M).
        valid: (N, M) bool.
        num_images: N.
        num_classes: K.

    Raises:
        ValueError: shapes do not match, or a class is out of range.
    """
    if not boxes.shape[:2] == classes.shape == valid.shape or len(valid) != num_images:
        raise ValueError(
            f"The ground truth has shapes {tuple(boxes.shape)}, {tuple(classes.shape)} and "
            f"{tuple(valid.shape)}. Expected (N, M, 4), (N, M) and (N, M) for N = {num_images}."
        )
    image, slot = valid.cpu().nonzero(as_tuple=True)
    boxes, classes = boxes.cpu()[image, slot], classes.cpu()[image, slot]
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(
            f"Ground-truth classes run from {classes.min()} to {classes.max()}, but the teacher "
            f"scores {num_classes}. Give teacher and student the same list of classes."
        )
    return Objects(image, boxes, classes)


def gather(
    objects: Objects,
    grids: Sequence[Grid],
    *,
    everywhere: bool,
    max_pairs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Pairs]:
    """
    List the pairs of a batch, in chunks of whole boxes.

    Args:
        objects: the ground truth, on the CPU.
        grids: of the R positions of an image.
        everywhere: pair a box with all positions of its image instead of those inside it.
        max_pairs: see `chunks_of_boxes`.
        device: where the pairs go.
        dtype: of their boxes.

    Yields:
        The pairs of consecutive boxes.
    """
    if everywhere:
        runs = runs_of_everything(grids, len(objects.image))
    else:
        runs = runs_of_boxes(grids, objects.boxes)
    # Boxes that hold no position drop out; a position is now one of those of all images.
    held, owner = torch.unique_consecutive(runs.owner, return_inverse=True)
    first = runs.first + objects.image[runs.owner] * count_positions(grids)
    boxes = to_device(objects.boxes[held], device).to(dtype)
    classes = to_device(objects.classes[held], device)
    for chunk, counts in chunks_of_boxes(Runs(owner, first, runs.length), max_pairs):
        owner, position = chunk.to(device).pairs(int(counts.sum()))
        yield Pairs(owner, boxes, classes, position, to_device(counts, device))


def score(pairs: Pairs, predictions: Predictions) -> tuple[Tensor, Tensor]:
    """
    Read what the teacher predicts at each pair's position for its box.

    Returns:
        Probability of the box's class, 0 where not valid, and IoU with the box, (P, A) each.
    """
    dtype, anchors = working_dtype(predictions.logits), predictions.num_anchors
    # index_select: a third of the time of indexing with brackets, and this is most of it all.
    index = pairs.position[:, None] * anchors + torch.arange(anchors, device=pairs.position.device)
    classes = pairs.classes.index_select(0, pairs.owner)[:, None]
    logits = predictions.logits.take(index * predictions.num_classes + classes)
    probability = logits.to(dtype).sigmoid()
    if predictions.valid is not None:
        probability = probability * predictions.valid.take(pairs.position)[:, None]
    boxes = predictions.boxes.index_select(0, pairs.position).view(-1, anchors, 4).to(dtype)
    return probability, aligned_iou(boxes, pairs.boxes.index_select(0, pairs.owner)[:, None])
