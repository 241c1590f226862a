"""Deformable convolution (Dai et al., ICCV 2017) through torchvision, without masks, in float32."""

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from kd_det.functional.precision import at_least_float32


def deform_conv(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """
    Convolve at given places: stride 1, same size, no bias; outside the map is zero.

    Args:
        x: (N, C, H, W).
        offset: (N, 2 k^2, H, W) in cells, how far each tap is moved from its place in the kernel:
            channel 2t down and 2t + 1 to the right for tap t, taps row by row.
        weight: (C', C, k, k), k odd.

    Returns:
        (N, C', H, W) in the dtype of x. Computed in float32 at least: half precision knows few
        parts of a cell, and torchvision has no bfloat16 kernel for the CPU.
    """
    with torch.autocast(x.device.type, enabled=False):
        out = deform_conv2d(
            at_least_float32(x),
            at_least_float32(offset),
            at_least_float32(weight),
            padding=weight.shape[-1] // 2,
        )
    return out.to(x.dtype)


class DeformConv(nn.Module):
    """
    A convolution that reads where it is told, see `deform_conv`.

    Args:
        channels: of the input and of the output.
        kernel_size: odd.
        std: standard deviation of the first weights.
    """

    def __init__(self, channels: int, kernel_size: int = 3, std: float = 0.01) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve (N, C, H, W) at offsets (N, 2 k^2, H, W); same shape as x."""
        return deform_conv(x, offset, self.weight)


class SelfDeformConv(nn.Module):
    """
    A 3x3 convolution that chooses by its own input where it reads; at first an ordinary one.

    Args:
        channels: of the input and of the output.
        std: standard deviation of the first weights; those of the offsets are 0.
    """

    def __init__(self, channels: int, std: float = 0.01) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.normal_(self.weight, std=std)
        self.offset = nn.Conv2d(channels, 18, kernel_size=3, padding=1)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W); same shape."""
        with torch.autocast(x.device.type, enabled=False):
            offset = self.offset(at_least_float32(x))
        return deform_conv(x, offset, self.weight)
