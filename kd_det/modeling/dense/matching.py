"""From the matches of each image to what the losses of a batch read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.functional.reduce import mean_over_processes


def join_images(matches: Sequence[Tensor], objects: Sequence[int]) -> Tensor:
    """
    Let the matches of all images point into the objects of all images, one after the other.

    Args:
        matches: per image, (..., R) int64 into its own objects, negative where there is none.
        objects: how many each image has.

    Returns:
        (..., N, R) int64; what was negative is what it was.
    """
    joined, start = [], 0
    for match, count in zip(matches, objects, strict=True):
        joined.append(torch.where(match >= 0, match + start, match))
        start += count
    return torch.stack(joined, dim=-2)


def class_targets(matched: Tensor, gt_classes: Tensor, logits: Tensor) -> Tensor:
    """
    Return what class probabilities are trained towards.

    Args:
        matched: (N, R) int64 into the objects of the batch, negative where there is none.
        gt_classes: (G,) of all objects of the batch.
        logits: (N, R, K).

    Returns:
        (N, R, K) of the dtype of the logits: 1 at the class of each position's object, 0 elsewhere.
    """
    num_classes = logits.shape[2]
    # The last one, -1, is the background.
    padded = torch.cat([gt_classes, gt_classes.new_full((1,), num_classes)])
    labels = padded[matched.clamp(min=-1)]
    targets = logits.new_zeros(*labels.shape, num_classes + 1)
    return targets.scatter_(2, labels[..., None], 1)[..., :num_classes]


@torch.no_grad()
def loss_divisors(matched: Tensor) -> Tensor:
    """
    Return what summed losses are divided by: the number of positives, at least 1 of each image.

    Args:
        matched: (S, N, R) int64 of S assignments, negative where there is no object.

    Returns:
        (S,) float32, at least 1; the mean over processes.
    """
    counts = (matched >= 0).sum(dim=2).clamp(min=1).sum(dim=1)
    return mean_over_processes(counts.float()).clamp(min=1)
