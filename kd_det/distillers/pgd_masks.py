"""The masks of PGD: what one step says of each position, and how a pair of maps reads it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_det.distillers.base import Pair
from kd_det.functional.level_grid import same_stride


@dataclass(frozen=True)
class Masks:
    """
    What one step's boxes and teacher say about each position, per teacher level, (N, H, W).

    Attributes:
        cls, reg: importance in [0, 1] for the classification and the regression tower.
        background: inside no box.
        valid: on the image, not on padding.
    """

    cls: list[Tensor]
    reg: list[Tensor]
    background: list[Tensor]
    valid: list[Tensor]


def pad_boxes(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (N, M, 4) and (N, M) bool: boxes padded to the largest number of an image."""
    padded = pad_sequence(boxes, batch_first=True).reshape(len(boxes), -1, 4)
    counts = torch.tensor([len(b) for b in boxes])
    return padded, torch.arange(padded.shape[1]) < counts[:, None]


def nearest_level(name: str, stride: float, strides: Sequence[float]) -> int:
    """
    Return which of the teacher's levels is nearest to a pair's.

    Args:
        name: of the pair, for the message.
        stride: of the pair.
        strides: at which the teacher predicts.

    Raises:
        ValueError: none is within half an octave.
    """
    gaps = [abs(math.log2(stride / other)) for other in strides]
    level = min(range(len(gaps)), key=gaps.__getitem__)
    if gaps[level] > 0.5:
        raise ValueError(
            f"KD.PGD: the levels {name} have stride {stride:g}, but the teacher predicts "
            f"at strides {', '.join(f'{other:g}' for other in strides)} only."
        )
    return level


def on_grid(masks: list[Tensor], pair: Pair, strides: Sequence[float]) -> Tensor:
    """
    Read a mask, given per teacher level, at the cells of a pair: (N, H, W) of the pair's maps.

    A resampled pair reads the teacher's cell in which the centre of its own cell lies.
    """
    level = nearest_level(pair.name, pair.stride, strides)
    mask = masks[level]
    height, width = pair.student.shape[-2:]
    if same_stride(pair.stride, strides[level]):
        return mask[:, :height, :width]  # what is cut off is padding beyond the common grid
    ratio = pair.stride / strides[level]
    for dim, count in ((1, height), (2, width)):
        cells = (torch.arange(count, device=mask.device) + 0.5) * ratio
        mask = mask.index_select(dim, cells.long().clamp(max=mask.shape[dim] - 1))
    return mask
