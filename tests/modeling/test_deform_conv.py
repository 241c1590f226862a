"""Deformable convolution: which channel moves which tap where, and in which precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.modeling.deform_conv import DeformConv, SelfDeformConv, deform_conv

# A feature that says its place: 10 * row + column.
PLACE = (torch.arange(5.0)[:, None] * 10 + torch.arange(5.0))[None, None]
KERNEL = torch.zeros(1, 1, 3, 3)


def read(offset: Tensor, kernel: Tensor) -> Tensor:
    return deform_conv(PLACE, offset, kernel)[0, 0]


def test_channels_are_down_and_right_of_each_tap() -> None:
    offset, kernel = torch.zeros(1, 18, 5, 5), KERNEL.clone()
    # Tap 5 is right of the middle: half a cell down, a quarter to the left of the middle.
    offset[:, 10], offset[:, 11] = 0.5, -1.25
    kernel[0, 0, 1, 2] = 1
    out = read(offset, kernel)
    values = [out[2, 2], out[0, 0], out[4, 2]]
    torch.testing.assert_close(torch.stack(values), torch.tensor([26.75, 3.75, 20.875]))


def test_every_tap_moves_by_its_own_channels() -> None:
    offset = ((torch.arange(18.0) - 9) / 10)[None, :, None, None].expand(1, 18, 5, 5)
    out = read(offset, ((torch.arange(9.0) - 4) / 5).view(1, 1, 3, 3))
    torch.testing.assert_close(out[[2, 0], [2, 4]], torch.tensor([63.6, 10.728]))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_without_offsets_it_is_an_ordinary_convolution(kernel_size: int) -> None:
    torch.manual_seed(0)
    conv = DeformConv(4, kernel_size, std=0.3)
    x = torch.randn(2, 4, 6, 7)
    offset = torch.zeros(2, 2 * kernel_size**2, 6, 7)
    expected = F.conv2d(x, conv.weight, padding=kernel_size // 2)
    torch.testing.assert_close(conv(x, offset), expected)


def test_one_that_chooses_by_itself_starts_as_an_ordinary_one_and_learns_where_to_read() -> None:
    torch.manual_seed(0)
    conv = SelfDeformConv(4, std=0.3)
    x = torch.randn(2, 4, 6, 7)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1))
    assert dict(conv.named_parameters()).keys() == {"weight", "offset.weight", "offset.bias"}
    conv(x).square().sum().backward()
    assert conv.offset.weight.grad is not None and conv.offset.weight.grad.any()


def test_half_precision_maps_are_read_in_float32() -> None:
    torch.manual_seed(0)
    conv = SelfDeformConv(4, std=0.3)
    torch.nn.init.normal_(conv.offset.weight, std=0.1)
    x = torch.randn(1, 4, 6, 7).bfloat16()
    expected = conv(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    # Away from whole cells, where the gradient of bilinear reading jumps.
    offset = 0.1 + 0.8 * torch.rand(1, 18, 4, 4, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(deform_conv, (x, offset.requires_grad_(), weight))
