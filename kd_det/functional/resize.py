"""Reducing an image by a factor, as a student that sees a small image needs it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.precision import at_least_float32

INTERPOLATIONS = ("nearest", "bilinear", "area")


def reduced_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Return ceil(height / factor), ceil(width / factor), safe against float rounding."""
    return math.ceil(height / factor - 1e-6), math.ceil(width / factor - 1e-6)


def is_whole(factor: float) -> bool:
    """Return whether a factor is an integer, so that cells stand for whole pixels."""
    return factor == int(factor)


def reduce_image(image: Tensor, factor: float, interpolation: str) -> Tensor:
    """
    Reduce images by a factor, cell centres kept (half-pixel convention).

    A whole factor reduces by exactly that much: pixel x lies at x / factor, whatever the sides.
    What the last cell lacks is filled by repeating the border.

    Args:
        image: (C, H, W) or (N, C, H, W), any dtype; integer images are rounded back.
        factor: >= 1; sides become ceil(side / factor).
        interpolation: "nearest" takes every factor-th pixel, starting with the first, as MSAD's
            code does; "bilinear" is antialiased; "area" averages the covered pixels.

    Returns:
        The reduced image, same dtype and number of dimensions.

    Raises:
        ValueError: factor below 1, or an unknown interpolation.
    """
    if factor < 1:
        raise ValueError(f"A view is reduced by a factor of at least 1, found {factor}.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"Interpolation {interpolation!r} is none of {', '.join(INTERPOLATIONS)}.")
    if factor == 1:
        return image
    if interpolation == "nearest" and is_whole(factor):
        return image[..., :: int(factor), :: int(factor)]
    size = reduced_size(image.shape[-2], image.shape[-1], factor)
    batch = image if image.dim() == 4 else image[None]
    work = at_least_float32(batch)
    if is_whole(factor):
        bottom, right = (-side % int(factor) for side in image.shape[-2:])
        if bottom or right:
            work = F.pad(work, (0, right, 0, bottom), mode="replicate")
    if interpolation == "bilinear":
        out = F.interpolate(work, size=size, mode="bilinear", align_corners=False, antialias=True)
    else:
        mode = "nearest-exact" if interpolation == "nearest" else "area"
        out = F.interpolate(work, size=size, mode=mode)
    if not image.is_floating_point():
        info = torch.iinfo(image.dtype)
        out = out.round().clamp(info.min, info.max)
    out = out.to(image.dtype)
    return out if image.dim() == 4 else out[0]
