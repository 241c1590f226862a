"""
SSIM of feature maps and its gradient in one pass over chunks of channels.

The loss is a mean, so its gradient is known up to one factor as soon as the forward pass is done:
it is formed right there, and is the only map kept for the backward pass. With G the window, G' its
transpose and P, Q, R the slopes of SSIM for G s, G s^2 and G s t (see terms.py):

    dSSIM/ds = G'P + 2 s G'Q + t G'R

The mean of each map is taken off s and t first: variances do not see it, and E[s^2] - mu^2 keeps
its digits. Of the variances only the sum is needed: four windowed maps forward, three back.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional._ssim.min_max import MinMax, min_max, min_max_backward
from kd_det.functional._ssim.options import SSIMOptions
from kd_det.functional._ssim.terms import similarity
from kd_det.functional._ssim.window import SeparableWindow, separable_window
from kd_det.functional.precision import full_float32_matmul, working_dtype

_Part = tuple[slice, slice]  # images and channels


class FusedSSIMLoss(torch.autograd.Function):
    """Mean of (1 - SSIM) / 2; the teacher is a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        options: SSIMOptions,
        want_grad: bool,
    ) -> Tensor:
        """Compute the loss, and its gradient if `want_grad`."""
        ctx.student_dtype = student.dtype
        grad = None
        if want_grad:
            dtype = working_dtype(student, teacher)
            grad = torch.empty(student.shape, dtype=dtype, device=student.device)
            ctx.save_for_backward(grad)
        return evaluate(student, teacher, mask, options, grad=grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Scale the gradient formed in the forward pass."""
        (grad,) = ctx.saved_tensors
        # float32 until the loss scale is on it: unscaled entries are below what float16 holds.
        return (grad * upstream).to(ctx.student_dtype), None, None, None, None


def evaluate(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: SSIMOptions,
    *,
    grad: Tensor | None = None,
    ssim: Tensor | None = None,
) -> Tensor:
    """
    Compute the loss of checked inputs; autograd must be off.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        mask: (N, 1, H, W) or None.
        options: what SSIM is taken of.
        grad: contiguous (N, C, H, W), to be filled with the gradient of the loss for the student.
        ssim: (N, C, H, W), smaller for border="valid", to be filled with SSIM.

    Returns:
        Scalar mean of (1 - SSIM) / 2.
    """
    dtype = working_dtype(student, teacher)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    if student.numel() == 0:
        return total.to(dtype)
    with torch.autocast(student.device.type, enabled=False), full_float32_matmul():
        valid = None if mask is None else mask.bool()
        plan = _plan(student, valid, options, dtype)
        scales = _scale(student, valid, options, dtype), _scale(teacher, valid, options, dtype)
        sums, moments = student.new_empty((2, *student.shape[:2]), dtype=dtype)
        for part in plan.parts:
            weight = None if valid is None else valid[part[0], 0].to(dtype).movedim(0, 1)
            pair = _load(student[part], teacher[part], scales, part, weight, plan)
            value, slopes = _compare(pair, plan, part, options)
            loss = 1 - value
            if weight is not None:
                loss *= weight
                slopes *= weight[:, None]
            total += loss.sum(dtype=torch.float64)
            if ssim is not None:
                ssim[part] = value.unflatten(1, ssim[part].shape[:2]).movedim(0, 2)
            if grad is not None:
                factor = scales[0].inverse[part].reshape(-1, 1) / (-2 * plan.positions)
                g, sum_g, moment = _chain(pair, slopes, plan, part, factor)
                grad[part] = g.unflatten(1, grad[part].shape[:2]).movedim(0, 2)
                sums[part], moments[part] = sum_g.view_as(sums[part]), moment.view_as(sums[part])
        if grad is not None and options.normalize != "none":
            min_max_backward(grad, scales[0], sums, moments, options.normalize)
    return (total / (2 * plan.positions)).to(dtype)


class _Plan(NamedTuple):
    """How a batch is worked through."""

    parts: list[_Part]
    windows: list[SeparableWindow]  # one of each image, or one of all
    positions: Tensor | int  # of all planes, that the mean is over
    maps: int  # that the window smooths for a pair of planes
    scratch: Tensor  # (4, enough for the maps of any part)

    def window(self, part: _Part) -> SeparableWindow:
        return self.windows[part[0].start if len(self.windows) > 1 else 0]


def _plan(student: Tensor, valid: Tensor | None, options: SSIMOptions, dtype: torch.dtype) -> _Plan:
    n, c, h, w = student.shape
    windows = _windows(student, valid, options, dtype)
    if valid is None:
        positions: Tensor | int = n * c * windows[0].rows.length * windows[0].columns.length
    else:
        positions = (valid.sum() * c).clamp_min(1)
    # Fast caches hold a small chunk; a GPU wants fewer and larger kernels.
    elements = options.chunk_elements or (2**18 if student.device.type == "cpu" else 2**20)
    parts = list(_chunks(n, c, elements // (h * w), by_image=valid is not None))
    # The sum of the variances will do, unless contrast or structure is taken alone.
    maps = 4 if options.exponents[1] == options.exponents[2] else 5
    planes = max((i.stop - i.start) * (j.stop - j.start) for i, j in parts)
    # Reused by all chunks: fresh memory costs more than the work done in it.
    scratch = torch.empty(4, maps * planes * h * w, dtype=dtype, device=student.device)
    return _Plan(parts, windows, positions, maps, scratch)


class _Pair(NamedTuple):
    """A chunk of K planes of both maps, normalised, less their means."""

    student: Tensor  # (H, K, W), a view of the stack
    teacher: Tensor
    student_mean: Tensor  # (K, 1)
    teacher_mean: Tensor
    stack: Tensor  # what the window is to smooth: (H, 4, K, W), or 5 if the variances stay apart


def _load(
    student: Tensor,
    teacher: Tensor,
    scales: tuple[MinMax, MinMax],
    part: _Part,
    weight: Tensor | None,
    plan: _Plan,
) -> _Pair:
    """Normalise a part and form what is to be smoothed, in the first quarter of the scratch."""
    n, c, h, w = student.shape
    space = plan.scratch[0]
    stack = space[: plan.maps * student.numel()].view(h, plan.maps, n * c, w)
    s, t, product, square, *square_t = stack.unbind(1)
    means = []
    for maps, scale, target in ((student, scales[0], s), (teacher, scales[1], t)):
        low, inverse = scale.low[part], scale.inverse[part]
        if weight is None:
            mean = maps.mean((2, 3), dtype=space.dtype)
        else:
            mean = (maps * weight.movedim(1, 0)).sum((2, 3), dtype=space.dtype)
            mean /= weight.sum().clamp_min(1)
        centred = target.unflatten(1, (n, c))
        torch.sub(maps.movedim(2, 0), mean[..., None], out=centred).mul_(inverse[..., None])
        means.append(((mean - low) * inverse).view(-1, 1))
    torch.mul(s, t, out=product)
    torch.mul(s, s, out=square)
    if square_t:
        torch.mul(t, t, out=square_t[0])
    else:
        square.addcmul_(t, t)
    return _Pair(s, t, means[0], means[1], stack)


def _compare(pair: _Pair, plan: _Plan, part: _Part, options: SSIMOptions) -> tuple[Tensor, Tensor]:
    """Return SSIM (H, K, W) and its slopes (H, 3, K, W)."""
    smooth = plan.window(part).smooth(
        pair.stack.flatten(1, 2), half=plan.scratch[1], out=plan.scratch[2]
    )
    means = pair.student_mean, pair.teacher_mean
    maps = smooth.unflatten(1, (plan.maps, -1))
    return similarity(maps, means, options.exponents, out=plan.scratch[1])


def _chain(
    pair: _Pair, slopes: Tensor, plan: _Plan, part: _Part, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor * d(sum of SSIM)/ds (H, K, W), its sum and its sum times s, per plane."""
    back = plan.window(part).adjoint(slopes.flatten(1, 2), plan.scratch[2], plan.scratch[3])
    g, g_square, g_product = back.chunk(3, dim=1)
    g.addcmul_(pair.student, g_square, value=2).addcmul_(pair.teacher, g_product).mul_(factor)
    sum_g = g.sum((0, 2))
    moment = (g * pair.student).sum((0, 2)) + pair.student_mean.flatten() * sum_g
    return g, sum_g, moment


def _scale(maps: Tensor, valid: Tensor | None, options: SSIMOptions, dtype: torch.dtype) -> MinMax:
    if options.normalize == "none":
        unused = torch.empty(0, device=maps.device)
        zero = torch.zeros(maps.shape[:2], dtype=dtype, device=maps.device)
        return MinMax(zero, zero + 1, unused, unused, unused, unused)
    scale = min_max(maps, options.normalize, valid)
    return scale._replace(low=scale.low.to(dtype), inverse=scale.inverse.to(dtype))


def _windows(
    maps: Tensor, valid: Tensor | None, options: SSIMOptions, dtype: torch.dtype
) -> list[SeparableWindow]:
    """Build the window of every image, a single one if no mask sets them apart."""
    h, w = maps.shape[2:]
    if valid is None:
        return [separable_window(options, h, w, device=maps.device, dtype=dtype)]
    extents = [
        (counted * torch.arange(1, counted.shape[1] + 1, device=maps.device)).amax(1).clamp_min(1)
        for counted in (valid.any(3)[:, 0], valid.any(2)[:, 0])
    ]
    return [
        separable_window(options, h, w, device=maps.device, dtype=dtype, extent=extent)
        for extent in zip(*extents, strict=True)
    ]


def _chunks(n: int, c: int, planes: int, *, by_image: bool) -> Iterator[_Part]:
    """Cut N images of C channels into parts of `planes` planes or fewer, one plane at least."""
    images = max(1, 1 if by_image else planes // c)
    pieces = -(-c // max(1, planes))
    edges = [c * k // pieces for k in range(pieces + 1)]
    for start in range(0, n, images):
        for first, last in pairwise(edges):
            yield slice(start, min(n, start + images)), slice(first, last)
