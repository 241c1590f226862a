"""
Structural similarity of feature maps as a loss.

SSIM (Wang et al., IEEE TIP 2004) of a student map s and a teacher map t, with windowed means mu,
variances var and covariance cov:

    SSIM = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1) * (2 cov + C2) / (var_s + var_t + C2)
    loss = mean of (1 - SSIM) / 2          C1 = 0.01^2    C2 = 0.03^2

taken on min-max normalised feature maps by de Rijk et al., "Structural Knowledge Distillation for
Object Detection" (NeurIPS 2022). Channels are never mixed.

`plain_ssim` says what is computed, and autograd could differentiate it. `ssim_loss` gives the same
value and the same gradient in one pass (`_ssim/fused.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.functional._ssim.fused import FusedSSIMLoss, evaluate
from kd_det.functional._ssim.min_max import min_max_normalize
from kd_det.functional._ssim.options import DEFAULT_SSIM, SSIMOptions
from kd_det.functional._ssim.terms import C1, C2, STD_EPS
from kd_det.functional._ssim.window import window_matrix
from kd_det.functional.precision import working_dtype

__all__ = [
    "DEFAULT_SSIM",
    "SSIMOptions",
    "min_max_normalize",
    "plain_ssim",
    "ssim_loss",
    "ssim_map",
]


def plain_ssim(student: Tensor, teacher: Tensor, options: SSIMOptions = DEFAULT_SSIM) -> Tensor:
    """Do as `ssim_map` does, with a gradient, slowly and with all intermediate maps kept."""
    s, t = student, teacher.detach()
    if options.normalize != "none":
        s, t = (min_max_normalize(x, per=options.normalize) for x in (s, t))
    rows, columns = (window_matrix(options, side).to(s) for side in s.shape[2:])

    def mean(x: Tensor) -> Tensor:
        return rows @ x @ columns.mT

    mu_s, mu_t = mean(s), mean(t)
    var_s, var_t = mean(s * s) - mu_s**2, mean(t * t) - mu_t**2
    covariance = mean(s * t) - mu_s * mu_t
    std_s, std_t = ((var.clamp_min(0) + STD_EPS * C2).sqrt() for var in (var_s, var_t))

    luminance = (2 * mu_s * mu_t + C1) / (mu_s**2 + mu_t**2 + C1)
    contrast = (2 * std_s * std_t + C2) / (var_s + var_t + C2)
    structure = (covariance + C2 / 2) / (std_s * std_t + C2 / 2)
    of_luminance, of_contrast, of_structure = options.exponents
    return luminance**of_luminance * contrast**of_contrast * structure**of_structure


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    options: SSIMOptions = DEFAULT_SSIM,
    mask: Tensor | None = None,
) -> Tensor:
    """
    Mean structural dissimilarity of two feature maps, (1 - SSIM) / 2.

    Args:
        student: (N, C, H, W), any size from 1 x 1, any memory format.
        teacher: same shape; a constant, it never receives a gradient.
        options: window, border rule, normalisation and terms.
        mask: (N, 1, H, W), nonzero where the maps count. The mean and the min-max see these
            positions alone, and the border rule takes the last counted row and column of each
            image for its border, so more padding at the bottom and the right changes nothing.

    Returns:
        Scalar in [0, 1] (for all three terms), the mean over N, C and the positions; zero where
        nothing counts. float64 for float64 input, float32 for any other, also under autocast.

    Raises:
        ValueError: shapes differ, or a "valid" window does not fit or is given a mask.
    """
    _check(student, teacher, mask, options)
    want_grad = torch.is_grad_enabled() and student.requires_grad
    loss: Tensor = FusedSSIMLoss.apply(student, teacher, mask, options, want_grad)
    return loss


def ssim_map(student: Tensor, teacher: Tensor, options: SSIMOptions = DEFAULT_SSIM) -> Tensor:
    """
    SSIM at every position, for pictures. The arguments are those of `ssim_loss`.

    Returns:
        (N, C, H, W) in [-1, 1] without gradient, smaller by window_size - 1 per side for
        border="valid"; float64 for float64 input, float32 for any other.

    Raises:
        ValueError: as `ssim_loss`.
    """
    _check(student, teacher, None, options)
    n, c, h, w = student.shape
    crop = options.window_size - 1 if options.border == "valid" else 0
    ssim = student.new_empty((n, c, h - crop, w - crop), dtype=working_dtype(student, teacher))
    with torch.no_grad():
        evaluate(student, teacher, None, options, ssim=ssim)
    return ssim


def _check(student: Tensor, teacher: Tensor, mask: Tensor | None, options: SSIMOptions) -> None:
    size = options.window_size
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "SSIM needs student and teacher of one shape (N, C, H, W), found "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: adapt channels and size first"
        )
    n, _, h, w = student.shape
    if options.border == "valid" and size > min(h, w):
        raise ValueError(
            f"SSIM border='valid' needs maps of at least the window, {size}x{size}, "
            f"found {h}x{w}: use 'reflect' or 'renorm', or a smaller window"
        )
    if mask is None:
        return
    if mask.shape != (n, 1, h, w):
        raise ValueError(f"SSIM mask: expected shape {(n, 1, h, w)}, found {tuple(mask.shape)}")
    if options.border == "valid":
        raise ValueError("SSIM mask needs border='reflect' or 'renorm', found 'valid'")
