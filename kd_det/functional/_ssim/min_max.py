"""Min-max normalisation of feature maps to [0, 1], with the gradient of minimum and maximum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.precision import working_dtype

GROUPS = ("channel", "image", "level")

# Added to a range before dividing, as kornia does.
RANGE_EPS = 1e-6
# A map of a smaller range is dead: it becomes 0 with gradient 0. Without it, a constant channel
# would get a gradient of 10^4, and one bad batch could destroy a training.
DEAD_RANGE = 1e-3


class MinMax(NamedTuple):
    """normalised = (x - low) * inverse. All (N, C)."""

    low: Tensor
    inverse: Tensor  # 0 for a dead map
    at_low: Tensor  # position, in H * W, of each plane's minimum; one only, whatever the ties
    at_high: Tensor
    sets_low: Tensor  # 1 for the plane that holds the minimum of its group, 0 for the others
    sets_high: Tensor


def min_max_normalize(x: Tensor, *, per: str = "channel", mask: Tensor | None = None) -> Tensor:
    """
    Scale maps to [0, 1] by their minimum and maximum, which take part in the gradient.

    A map whose range is below `DEAD_RANGE` becomes 0 with gradient 0.

    Args:
        x: (N, C, H, W).
        per: what shares one range: each "channel" of each image, each "image", the whole "level".
        mask: (N, 1, H, W), nonzero where the maps count: other positions are scaled too but do not
            set the range.

    Returns:
        (N, C, H, W), float64 for float64 input and float32 for any other.

    Raises:
        ValueError: `per` is unknown.
    """
    scale = min_max(x, per, None if mask is None else mask.bool())
    return (x - scale.low[..., None, None]) * scale.inverse[..., None, None]


def min_max(x: Tensor, per: str, valid: Tensor | None) -> MinMax:
    """Find the scale of `min_max_normalize`; `valid` (N, 1, H, W) is its mask as booleans."""
    if per not in GROUPS:
        raise ValueError(f"min-max per {per!r}: expected one of {GROUPS}")
    planes = x.flatten(2)
    if valid is None:
        (low, at_low), (high, at_high) = planes.min(2), planes.max(2)
    else:
        valid = valid.flatten(2)
        low, at_low = planes.masked_fill(~valid, torch.inf).min(2)
        high, at_high = planes.masked_fill(~valid, -torch.inf).max(2)
    dtype = working_dtype(x)
    low, sets_low = _group_extreme(-low.to(dtype), per)
    high, sets_high = _group_extreme(high.to(dtype), per)
    width = high + low
    alive = width >= DEAD_RANGE
    inverse = torch.where(alive, 1 / torch.where(alive, width + RANGE_EPS, 1), 0)
    return MinMax(torch.where(alive, -low, 0), inverse, at_low, at_high, sets_low, sets_high)


def min_max_backward(grad: Tensor, scale: MinMax, sums: Tensor, moments: Tensor, per: str) -> None:
    """
    Add what flows through minimum and maximum to the gradient of `min_max_normalize`, in place.

    With g the gradient of the normalised map y: g * inverse everywhere, which `grad` holds already,
    and in addition, with sums over the group, (-sum g + sum g y) * inverse at the minimum and
    -(sum g y) * inverse at the maximum.

    Args:
        grad: g * inverse, (N, C, H, W), contiguous.
        scale: the scale used.
        sums: sum of g * inverse over each plane, (N, C).
        moments: sum of g * inverse * y over each plane, (N, C).
        per: as in `min_max_normalize`.
    """
    sums, moments = _group_sum(sums, per), _group_sum(moments, per)
    planes = grad.flatten(2)
    for at, value in (
        (scale.at_low, (moments - sums) * scale.sets_low),
        (scale.at_high, -moments * scale.sets_high),
    ):
        planes.scatter_add_(2, at[..., None], value.to(grad.dtype)[..., None])


def _grouped(values: Tensor, per: str) -> Tensor:
    """View (N, C) values as (groups, members)."""
    n, c = values.shape
    return values.reshape({"channel": (n * c, 1), "image": (n, c), "level": (1, n * c)}[per])


def _group_extreme(values: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Give every plane (N, C) the maximum of its group, and mark the plane it comes from."""
    groups = _grouped(values, per)
    extreme, member = groups.max(1, keepdim=True)
    marks = torch.zeros_like(groups).scatter_(1, member, 1)
    return extreme.expand_as(groups).reshape(values.shape), marks.reshape(values.shape)


def _group_sum(values: Tensor, per: str) -> Tensor:
    groups = _grouped(values, per)
    return groups.sum(1, keepdim=True).expand_as(groups).reshape(values.shape)
