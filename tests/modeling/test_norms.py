"""GroupNorm of any width."""

import pytest
import torch
from torch import nn

from kd_det.modeling.norms import GroupNorm, head_norm


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 32), (48, 16), (36, 4), (7, 1), (1, 1)]
)
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    norm = GroupNorm(channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_of_usual_widths_is_detectron2s() -> None:
    x = torch.randn(2, 64, 3, 3)
    assert torch.equal(GroupNorm(64)(x), nn.GroupNorm(32, 64)(x))


def test_head_norm() -> None:
    assert head_norm("GN") is GroupNorm
    assert [head_norm(name) for name in ("", "BN", "SyncBN")] == ["", "BN", "SyncBN"]
