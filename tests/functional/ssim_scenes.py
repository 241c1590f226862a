"""Maps to compare, and SSIM with its options as keywords."""

import torch
from torch import Tensor

from kd_det.functional.ssim import SSIMOptions, ssim_loss, ssim_map


def dissimilarity(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, **options: object
) -> Tensor:
    return ssim_loss(student, teacher, SSIMOptions(**options), mask)


def similarity(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return ssim_map(student, teacher, SSIMOptions(**options))


def gradient(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    dissimilarity(leaf, teacher, **options).backward()
    return leaf.grad


def random_maps(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(shape, generator=generator, dtype=torch.float64)
    return 0.7 * teacher + 0.5 * torch.rand(shape, generator=generator).double(), teacher
