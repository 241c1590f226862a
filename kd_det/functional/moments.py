"""Mean and variance of the channels of a map, of each image or of a whole batch."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kd_det.functional.precision import at_least_float32

Scope = Literal["batch", "image"]


class Moments(NamedTuple):
    """
    First and second moments of each channel, B being 1 (batch) or N (image).

    Args:
        mean: (B, C, 1, 1).
        variance: population variance, (B, C, 1, 1).
        centred: the map minus its mean, (N, C, H, W).
    """

    mean: Tensor
    variance: Tensor
    centred: Tensor


def channel_moments(x: Tensor, *, mask: Tensor | None = None, scope: Scope = "batch") -> Moments:
    """
    Compute mean and variance of each channel over the cells that count.

    Args:
        x: (N, C, H, W), any floating dtype; computed in float32 at least, whatever autocast says.
        mask: (N, 1, H, W) in {0, 1}, cells that count; None for all.
        scope: "batch" for one mean of all images' cells, "image" for one of each image.

    Returns:
        The moments; where no cell counts, mean and variance 0.

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in ("batch", "image"):
        raise ValueError(f"scope is {scope!r}, expected 'batch' or 'image'.")
    dims = (0, 2, 3) if scope == "batch" else (2, 3)
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        if mask is None:
            mean = x.mean(dims, keepdim=True)
            centred = x - mean
            return Moments(mean, centred.square().mean(dims, keepdim=True), centred)
        weight = mask.to(x.dtype)
        count = weight.sum(dims, keepdim=True).clamp(min=1)
        mean = (x * weight).sum(dims, keepdim=True) / count
        # Not E[x^2] - mean^2, which in float32 loses all its digits.
        centred = x - mean
        variance = (centred.square() * weight).sum(dims, keepdim=True) / count
        return Moments(mean, variance, centred)


def inverse_deviation(variance: Tensor, eps: float) -> Tensor:
    """
    Return 1 / sqrt(variance + eps), and 0 without gradient for dead channels.

    A channel is dead where its variance is at most eps: standardised it would be noise, and its
    gradient 1 / sqrt(eps) times too large.
    """
    return torch.where(variance > eps, torch.rsqrt(variance + eps), 0)


def standardize_channels(
    x: Tensor, *, mask: Tensor | None = None, scope: Scope = "batch", eps: float = 1e-6
) -> Tensor:
    """
    Bring each channel to mean 0 and variance 1 over the cells that count.

    Args:
        x: (N, C, H, W).
        mask: (N, 1, H, W) in {0, 1}; None for all cells.
        scope: see `channel_moments`.
        eps: added to the variance; a channel of no larger variance becomes 0, without gradient.

    Returns:
        (N, C, H, W), float32 at least.
    """
    moments = channel_moments(x, mask=mask, scope=scope)
    with torch.autocast(x.device.type, enabled=False):
        return moments.centred * inverse_deviation(moments.variance, eps)
