"""
The losses of FGD on one pyramid level: objects and background apart, and what relates all cells.

Paper: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022. For maps F
of P cells, S student's and T teacher's:

    spatial attention  As = P softmax_cells(mean_c |F| / tau)
    channel attention  Ac = C softmax_c(mean_cells |F| / tau)
    L_fg  = 1/N sum FG As^T Ac^T (S - T)^2          FG = 1 / cells of the smallest box over a cell
    L_bg  = 1/N sum BG As^T Ac^T (S - T)^2          BG = 1 / cells in no box, there
    L_at  = 1/N (sum |As^S - As^T| + sum |Ac^S - Ac^T|)
    L_glo = 1/N sum (R_S(S) - R_T(T))^2
    R(F)  = F + conv(ReLU(LN(conv(sum_cells F softmax_cells(conv_{C->1} F)))))      1x1 convolutions

The release lets a box end one cell later, and places boxes wrongly in images smaller than their
batch; here a box holds the cells it touches. With `valid`, padding is no background and takes no
part in attentions, contexts and errors (the release has no such mask).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_det.functional.attention import spatial_attention
from kd_det.functional.precision import at_least_float32


def foreground_mask(boxes: Sequence[Tensor], size: tuple[int, int], stride: float) -> Tensor:
    """
    Give each cell 1 / (cells of its smallest box).

    A box holds the cells floor(x0 / stride) .. ceil(x1 / stride) - 1, at least one, and likewise in
    y; those off the map do not count. Boxes without positive sides hold nothing.

    Args:
        boxes: per image, (M, 4) corners in pixels, on the CPU, where the sizes of what follows are
            decided.
        size: (H, W) of the level.
        stride: pixels per cell.

    Returns:
        FG in [0, 1], (N, H, W) float32 on the CPU; 0 in no box.
    """
    height, width = size
    every = torch.cat([x.reshape(-1, 4) for x in boxes]).double()
    image = torch.repeat_interleave(torch.tensor([len(x) for x in boxes]))
    proper = (every[:, 2:] > every[:, :2]).all(1) & every.isfinite().all(1)
    corners, image = every[proper] / stride, image[proper]
    limit = torch.tensor([width, height])
    first = corners[:, :2].floor().long()
    last = torch.maximum(first + 1, corners[:, 2:].ceil().long()).clamp(max=limit)
    first = first.clamp(min=0)
    columns, rows = (last - first).clamp(min=0).unbind(1)
    cells = rows * columns

    owner = torch.repeat_interleave(cells)
    number = torch.arange(len(owner)) - (cells.cumsum(0) - cells)[owner]
    x = first[owner, 0] + number % columns[owner]
    y = first[owner, 1] + number // columns[owner]
    mask = torch.zeros(len(boxes) * height * width)
    mask.scatter_reduce_(0, (image[owner] * height + y) * width + x, 1 / cells[owner], "amax")
    return mask.view(len(boxes), height, width)


def background_mask(foreground: Tensor, valid: Tensor | None = None) -> Tensor:
    """
    Give each cell in no box 1 / (number of such cells of its image).

    Args:
        foreground: FG, (N, H, W).
        valid: (N, H, W) bool, False on padding, which is no background; None for no padding.

    Returns:
        BG in [0, 1], (N, H, W); all 0 for an image full of boxes.
    """
    free = foreground == 0
    if valid is not None:
        free = free & valid
    return free / free.sum((1, 2), keepdim=True).clamp(min=1)


def channel_attention(features: Tensor, tau: float, valid: Tensor | None = None) -> Tensor:
    """
    Compare the channels of each image.

    Args:
        features: (N, C, H, W).
        tau: temperature, above 0; smaller values sharpen.
        valid: (N, H, W) bool, cells that count; None for all.

    Returns:
        C * softmax_c(mean over cells of |features| / tau), (N, C); sums to C.
    """
    size = features.abs()
    if valid is None:
        mean = size.mean((2, 3))
    else:
        count = valid.sum((1, 2)).clamp(min=1)
        mean = (size * valid[:, None]).sum((2, 3)) / count[:, None]
    return (mean / tau).softmax(1) * features.shape[1]


class FocalTerms(NamedTuple):
    """The parts of the focal loss of one level, unweighted scalars."""

    foreground: Tensor
    background: Tensor
    attention: Tensor


def focal_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    *,
    tau: float = 0.5,
    valid: Tensor | None = None,
) -> FocalTerms:
    """
    Compare features where objects are, where none are, and where both models attend.

    Args:
        student, teacher: (N, C, H, W), any floating dtype.
        foreground: FG, (N, H, W), see `foreground_mask`, on the maps' device.
        tau: temperature of the attentions.
        valid: (N, H, W) bool, False on padding; None counts all cells.

    Returns:
        The terms, float32 at least; the teacher's attentions weigh the errors, the student's get
        their gradient from the third alone. Zero for equal features.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        where = [spatial_attention(x.abs().mean(1), tau, valid) for x in (student, teacher)]
        which = [channel_attention(x, tau, valid) for x in (student, teacher)]
        error = ((student - teacher).square() * which[1][:, :, None, None]).sum(1) * where[1]
        distances = [(own - other).abs().sum() for own, other in (where, which)]
        return FocalTerms(
            foreground=(foreground * error).sum() / len(student),
            background=(background_mask(foreground, valid) * error).sum() / len(student),
            attention=(distances[0] + distances[1]) / len(student),
        )


class GlobalContext(nn.Module):
    """
    R, which adds to every cell what the cells have in common; the identity when new.

    Args:
        channels: C; the bottleneck has C // 2, at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, 1)
        last = nn.Linear(hidden, channels)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), last
        )
        nn.init.normal_(self.attend.weight, std=math.sqrt(2 / channels))
        assert self.attend.bias is not None
        nn.init.zeros_(self.attend.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Add the context.

        Args:
            features: (N, C, H, W), float32 at least.
            valid: (N, H, W) bool, cells that the context is taken from; None for all.

        Returns:
            (N, C, H, W).
        """
        logits = self.attend(features).flatten(1)
        if valid is not None:
            logits = logits.masked_fill(~valid.flatten(1), torch.finfo(logits.dtype).min)
        context = (features.flatten(2) @ logits.softmax(1)[:, :, None])[:, :, 0]
        return features + self.transform(context)[:, :, None, None]


class GlobalRelation(nn.Module):
    """
    L_glo with its two trainable blocks, the student's and the teacher's; dropped after training.

    Args:
        channels: C of the teacher's map, which the student's has after its adapter.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student = GlobalContext(channels)
        self.teacher = GlobalContext(channels)

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Compare both maps with their contexts.

        Args:
            student, teacher: (N, C, H, W), any floating dtype.
            valid: (N, H, W) bool, False on padding; None counts all cells.

        Returns:
            Scalar >= 0, summed over channels and cells, float32 at least, whatever autocast says.
            Gradient reaches the student's map and both blocks.
        """
        with torch.autocast(student.device.type, enabled=False):
            own = self.student(at_least_float32(student), valid)
            other = self.teacher(at_least_float32(teacher.detach()), valid)
            error = (own - other).square()
            if valid is not None:
                error = error * valid[:, None]
            return error.sum() / len(student)
