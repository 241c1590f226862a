"""The normalisation layers of heads and narrow nets, by their names in a config."""

import math
from typing import Any

from torch import nn


class GroupNorm(nn.GroupNorm):
    """
    GroupNorm with gcd(32, channels) groups, as narrow students and Detectron2's heads need it.

    Detectron2's own "GN" asks for 32 groups of any width, and v0.6's RetinaNetHead probes it with
    one channel, which raises. Groups of a single channel have no statistics on a 1x1 map, so where
    gcd gives those, they hold two. Pass this class where a head takes a norm callable.
    """

    def __init__(self, num_channels: int) -> None:
        groups = math.gcd(32, num_channels)
        super().__init__(groups // 2 if groups == num_channels > 1 else groups, num_channels)


def head_norm(name: str) -> Any:
    """
    Return what a Detectron2 dense head accepts as `norm`.

    Args:
        name: a Detectron2 norm name ("", "GN", "BN", "SyncBN", ...).

    Returns:
        The name itself, or `GroupNorm` for "GN".
    """
    return GroupNorm if name == "GN" else name
