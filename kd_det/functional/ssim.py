"""
Structural similarity of feature maps as a loss.

SSIM (Wang et al., IEEE TIP 2004) of a student map s and a teacher map t, with windowed means mu,
variances var and covariance cov:

    SSIM = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1) * (2 cov + C2) / (var_s + var_t + C2)
    loss = mean of (1 - SSIM) / 2          C1 = (k1 L)^2    C2 = (k2 L)^2

taken on min-max normalised feature maps by de Rijk et al., "Structural Knowledge Distillation for
Object Detection" (NeurIPS 2022). Channels are never mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.functional.min_max import GROUPS, min_max_normalize
from kd_det.functional.precision import working_dtype
from kd_det.functional.ssim_fused import FusedSsimLoss, SsimOptions, evaluate
from kd_det.functional.window import BORDERS, WINDOWS, WindowSpec

__all__ = ["min_max_normalize", "ssim_loss", "ssim_map"]


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    window: str = "gaussian",
    border: str = "reflect",
    normalize: str = "channel",
    normalize_eps: float = 1e-6,
    dead_range: float = 1e-3,
    exponents: tuple[int, int, int] = (1, 1, 1),
    dynamic_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    mask: Tensor | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """
    Mean structural dissimilarity of two feature maps, (1 - SSIM) / 2.

    Args:
        student: (N, C, H, W), any size from 1 x 1, any memory format.
        teacher: same shape; a constant, it never receives a gradient.
        window_size: odd number of positions per side of the window.
        sigma: standard deviation of the Gaussian window, in positions.
        window: "gaussian" or "box".
        border: "reflect" mirrors about the border position, "renorm" rescales the part of the
            window inside the map, "valid" keeps only whole windows.
        normalize: what shares one min-max range, which takes part in the gradient: each "channel"
            of each image, each "image", the whole "level", or "none" for maps that already lie in
            [0, dynamic_range].
        normalize_eps: added to the range before dividing.
        dead_range: a map whose range is smaller becomes 0 with gradient 0.
        exponents: (luminance, contrast, structure), each 0 or 1.
        dynamic_range: L of the constants.
        k1: constant of the luminance term.
        k2: constant of the contrast and structure terms.
        mask: (N, 1, H, W), nonzero where the maps count. The mean and the min-max see these
            positions alone, and the border rule takes the last counted row and column of each
            image for its border, so more padding at the bottom and the right changes nothing.
        chunk_elements: elements of each map worked on at once, at most (one plane at least). The
            transient memory is about 20 times as many. None: 2**18 on CPU, 2**20 elsewhere.

    Returns:
        Scalar in [0, 1] (for all three terms), the mean over N, C and the positions; zero where
        nothing counts. float64 for float64 input, float32 for any other, also under autocast.

    Raises:
        ValueError: an option is out of range, shapes differ, or a "valid" window does not fit.
    """
    options = SsimOptions(
        WindowSpec(window_size, sigma, window, border),
        normalize,
        normalize_eps,
        dead_range,
        exponents,
        (k1 * dynamic_range) ** 2,
        (k2 * dynamic_range) ** 2,
        chunk_elements,
    )
    _check(student, teacher, mask, options)
    want_grad = torch.is_grad_enabled() and student.requires_grad
    loss: Tensor = FusedSsimLoss.apply(student, teacher, mask, options, want_grad)
    return loss


def ssim_map(
    student: Tensor,
    teacher: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    window: str = "gaussian",
    border: str = "reflect",
    normalize: str = "channel",
    normalize_eps: float = 1e-6,
    dead_range: float = 1e-3,
    exponents: tuple[int, int, int] = (1, 1, 1),
    dynamic_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    chunk_elements: int | None = None,
) -> Tensor:
    """
    SSIM at every position, for pictures. The arguments are those of `ssim_loss`.

    Returns:
        (N, C, H, W) in [-1, 1] without gradient, smaller by window_size - 1 per side for
        border="valid"; float64 for float64 input, float32 for any other.

    Raises:
        ValueError: as `ssim_loss`.
    """
    options = SsimOptions(
        WindowSpec(window_size, sigma, window, border),
        normalize,
        normalize_eps,
        dead_range,
        exponents,
        (k1 * dynamic_range) ** 2,
        (k2 * dynamic_range) ** 2,
        chunk_elements,
    )
    _check(student, teacher, None, options)
    n, c, h, w = student.shape
    crop = window_size - 1 if border == "valid" else 0
    ssim = student.new_empty((n, c, h - crop, w - crop), dtype=working_dtype(student, teacher))
    with torch.no_grad():
        evaluate(student, teacher, None, options, ssim=ssim)
    return ssim


def _check(student: Tensor, teacher: Tensor, mask: Tensor | None, options: SsimOptions) -> None:
    spec = options.window
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "SSIM needs student and teacher of one shape (N, C, H, W), found "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: adapt channels and size first"
        )
    if spec.size < 1 or spec.size % 2 == 0 or not spec.sigma > 0:
        raise ValueError(
            f"SSIM window_size must be odd and sigma positive, found {spec.size} and {spec.sigma}"
        )
    if spec.border == "valid" and spec.size > min(student.shape[2:]):
        h, w = student.shape[2:]
        raise ValueError(
            f"SSIM border='valid' needs maps of at least the window, {spec.size}x{spec.size}, "
            f"found {h}x{w}: use 'reflect' or 'renorm', or a smaller window"
        )
    for name, value, known in (
        ("window", spec.kind, WINDOWS),
        ("border", spec.border, BORDERS),
        ("normalize", options.normalize, (*GROUPS, "none")),
    ):
        if value not in known:
            raise ValueError(f"SSIM {name}={value!r}: expected one of {known}")
    if len(options.exponents) != 3 or not set(options.exponents) <= {0, 1}:
        raise ValueError(f"SSIM exponents are three of 0 and 1, found {options.exponents}")
    if not any(options.exponents):
        raise ValueError("SSIM exponents (0, 0, 0) leave nothing to compare: set one to 1")
    if not (options.c1 > 0 and options.c2 > 0):
        raise ValueError("SSIM dynamic_range, k1 and k2 must not be 0: the terms divide by them")
    if options.chunk_elements is not None and options.chunk_elements < 1:
        raise ValueError(f"SSIM chunk_elements must be positive, found {options.chunk_elements}")
    if mask is None:
        return
    n, _, h, w = student.shape
    if mask.shape != (n, 1, h, w):
        raise ValueError(f"SSIM mask: expected shape {(n, 1, h, w)}, found {tuple(mask.shape)}")
    if spec.border == "valid":
        raise ValueError("SSIM mask needs border='reflect' or 'renorm', found 'valid'")
