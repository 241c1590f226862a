"""
Attention over channels and positions, and the feature differences it weights.

Everything in PGD's losses that is as large as the features happens here, in one autograd function
that keeps nothing but references to them; what comes out are maps of one number per position.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional.precision import working_dtype


def channel_attention(features: Tensor, tau: float) -> Tensor:
    """
    Compare the channels of each position.

    Args:
        features: (N, C, H, W).
        tau: temperature, above 0; smaller values sharpen.

    Returns:
        C * softmax_c(|features| / tau), (N, C, H, W); sums to C at each position.
    """
    # In place, since this is as large as the features.
    return features.abs().div_(tau).softmax(1).mul_(features.shape[1])


def spatial_attention(magnitude: Tensor, tau: float, valid: Tensor | None = None) -> Tensor:
    """
    Compare the positions of each image.

    Args:
        magnitude: mean over channels of the features' absolute values, (N, H, W).
        tau: temperature, above 0; smaller values sharpen.
        valid: (N, H, W) bool; other positions take no part and get 0.

    Returns:
        P * softmax_p(magnitude / tau), (N, H, W), for an image of P (valid) positions; sums to P.
    """
    logits = (magnitude / tau).flatten(1)
    if valid is None:
        return (logits.softmax(1) * logits.shape[1]).view_as(magnitude)
    inside = valid.flatten(1)
    # The smallest number instead of -inf: a level without any valid position gives 0, not NaN.
    logits = logits.masked_fill(~inside, torch.finfo(logits.dtype).min)
    return (logits.softmax(1) * inside * inside.sum(1, keepdim=True)).view_as(magnitude)


class Comparison(NamedTuple):
    """
    Student against teacher at each position, all (N, H, W).

    Args:
        error: sum over channels of A^T (F^S - F^T)^2, with the teacher's channel attention A^T.
        attention_distance: sum over channels of |A^S - A^T|.
        student_magnitude: mean over channels of |F^S|.
        teacher_magnitude: mean over channels of |F^T|, without gradient.
    """

    error: Tensor
    attention_distance: Tensor
    student_magnitude: Tensor
    teacher_magnitude: Tensor


def plain_comparison(student: Tensor, teacher: Tensor, tau: float) -> Comparison:
    """Do as `compare_features` does, with all that autograd keeps of it."""
    teacher = teacher.detach()
    attention, teacher_attention = (
        x.shape[1] * (x.abs() / tau).softmax(1) for x in (student, teacher)
    )
    return Comparison(
        error=(teacher_attention * (student - teacher) ** 2).sum(1),
        attention_distance=(attention - teacher_attention).abs().sum(1),
        student_magnitude=student.abs().mean(1),
        teacher_magnitude=teacher.abs().mean(1),
    )


def compare_features(student: Tensor, teacher: Tensor, tau: float) -> Comparison:
    """
    Reduce the difference of two feature maps to what PGD's losses need at each position.

    `plain_comparison` says how; this gives the same and keeps only references to the features.

    Args:
        student, teacher: (N, C, H, W), any floating dtype; computed in float32 or wider.
        tau: temperature of the channel attention.

    Returns:
        The maps; the gradients of the first three reach the student alone.
    """
    return Comparison(*_Compare.apply(student, teacher, tau))


class _Compare(torch.autograd.Function):
    """
    Reduce two feature maps to the maps of `Comparison`.

    Written out, because autograd would keep five tensors as large as the features for the backward
    pass. This keeps references to the features, computes the attentions again, and works on blocks
    of rows that fit a CPU's cache, which is 3 times as fast there.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, ...]:
        ctx.save_for_backward(student, teacher)
        ctx.tau = tau
        rows = _rows_per_block(student)
        pieces = zip(student.split(rows, 2), teacher.split(rows, 2), strict=True)
        blocks = [_reduce(*_wide(*piece), tau) for piece in pieces]
        maps = tuple(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        ctx.mark_non_differentiable(maps[3])
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        rows = _rows_per_block(student)
        grad = torch.empty_like(student)
        features = (tensor.split(rows, 2) for tensor in (grad, student, teacher))
        of_maps = (tensor.split(rows, 1) for tensor in grads[:3])
        for out, s, t, *block in zip(*features, *of_maps, strict=True):
            out.copy_(_gradient(*_wide(s, t), ctx.tau, *block))
        return grad, None, None


def _reduce(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, ...]:
    teacher_attention = channel_attention(teacher, tau)
    error = (student - teacher).square_().mul_(teacher_attention).sum(1)
    distance = channel_attention(student, tau).sub_(teacher_attention).abs_().sum(1)
    return error, distance, student.abs().mean(1), teacher.abs().mean(1)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    tau: float,
    grad_error: Tensor,
    grad_distance: Tensor,
    grad_magnitude: Tensor,
) -> Tensor:
    """Return the student's gradient, (N, C, H, W), from those of the first three maps."""
    teacher_attention = channel_attention(teacher, tau)
    attention = channel_attention(student, tau)
    grad = (student - teacher).mul_(teacher_attention).mul_(2 * grad_error[:, None])
    # Of |A^S - A^T| in |F^S| / tau: its sign through the Jacobian of the softmax.
    sign = (attention - teacher_attention).sign_()
    mean = (sign * attention).mean(1, keepdim=True)
    outer = sign.sub_(mean).mul_(attention).mul_(grad_distance[:, None] / tau)
    outer.add_(grad_magnitude[:, None] / student.shape[1])
    return grad.addcmul_(outer, student.sign())


def _rows_per_block(features: Tensor) -> int:
    """Count the rows that hold about 2^18 elements on a CPU; elsewhere only memory limits them."""
    elements = 1 << 18 if features.device.type == "cpu" else 1 << 26
    return max(1, elements * features.shape[2] // features.numel())


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)
