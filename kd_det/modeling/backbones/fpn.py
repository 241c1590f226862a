"""
Detectron2's FPN on any bottom-up net, with a choice of extra levels above it.

One builder covers students and teachers of any pyramid: P3..P7 for a detector at full resolution,
P2..P6 for its half-resolution student, whose parameters carry the same names.
"""

from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from kd_det.modeling.backbones.small_resnet import build_resnet_any_width_backbone
from kd_det.modeling.backbones.timm_backbone import build_timm_backbone
from kd_det.modeling.norms import head_norm
from kd_det.modeling.options import add_keys
from kd_det.modeling.registering import register_in

_BOTTOM_UPS = {"resnet": build_resnet_any_width_backbone, "timm": build_timm_backbone}


class LastLevelP6(nn.Module):
    """
    P6 alone: the first half of Detectron2's `LastLevelP6P7`, same parameter names.

    Detectors on P2..P6 use it: a P7 nobody reads would be parameters without gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str) -> None:
        super().__init__()
        self.num_levels = 1
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return [P6], (N, out_channels, H / 2, W / 2) rounded up, for a map (N, C, H, W)."""
        return [self.p6(x)]


def pick_features(backbone: Backbone, names: Sequence[str], key: str) -> list[ShapeSpec]:
    """
    Return the shapes of the backbone's levels `names`, in that order.

    Raises:
        ValueError: the backbone has no such level; `key` is the config key the message blames.
    """
    shapes = backbone.output_shape()
    missing = [name for name in names if name not in shapes]
    if missing or not names:
        raise ValueError(f"{key} is {list(names)}, but the backbone below gives {list(shapes)}.")
    return [shapes[name] for name in names]


def build_top_block(kind: str, *, c5_channels: int, out_channels: int) -> nn.Module | None:
    """
    Build the levels above P5.

    Args:
        kind: "p6p7_c5" (RetinaNet), "p6p7_p5" (FCOS), "p6_c5", "maxpool" (Faster R-CNN) or "none".
        c5_channels: channels of the bottom-up net's last map, res5.
        out_channels: channels of the pyramid.

    Raises:
        ValueError: another kind.
    """
    if kind == "p6p7_c5":
        return LastLevelP6P7(c5_channels, out_channels, in_feature="res5")
    if kind == "p6p7_p5":
        return LastLevelP6P7(out_channels, out_channels, in_feature="p5")
    if kind == "p6_c5":
        return LastLevelP6(c5_channels, out_channels, in_feature="res5")
    if kind == "maxpool":
        return LastLevelMaxPool()
    if kind == "none":
        return None
    raise ValueError(
        f"MODEL.FPN.TOP_BLOCK is {kind!r}; expected p6p7_c5, p6p7_p5, p6_c5, maxpool or none."
    )


def add_backbone_config(cfg: CfgNode) -> None:
    """
    Add the keys of BACKBONE.NAME "build_fpn_backbone", beside Detectron2's own MODEL.FPN.*.

    The pyramid starts at the level of IN_FEATURES[0] (res2: P2, res3: P3).
    """
    keys: dict[str, Any] = {}
    # The net below: "resnet" (MODEL.RESNETS.*, any width, also depth 18 and 34) or "timm"
    # (MODEL.TIMM.*).
    keys["BOTTOM_UP"] = "resnet"
    # Levels above P5: "p6p7_c5" (convolutions on C5: RetinaNet, ICCV 2017; MSAD), "p6p7_p5" (on P5:
    # FCOS, TPAMI 2020), "p6_c5" (P6 alone, for detectors on P2..P6), "maxpool" (P6 subsamples P5:
    # FPN, CVPR 2017) or "none".
    keys["TOP_BLOCK"] = "p6p7_c5"
    add_keys(cfg.MODEL, "FPN", keys)


@register_in(BACKBONE_REGISTRY)
def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Build an FPN from MODEL.FPN on the bottom-up net MODEL.FPN.BOTTOM_UP.

    Args:
        cfg: a full config; its levels start at the stride of IN_FEATURES[0] (res2: P2).
        input_shape: channels of the image.

    Raises:
        ValueError: a key with a value this builder does not know, or levels that do not exist.
    """
    fpn = cfg.MODEL.FPN
    if fpn.BOTTOM_UP not in _BOTTOM_UPS:
        raise ValueError(f"MODEL.FPN.BOTTOM_UP is {fpn.BOTTOM_UP!r}; expected resnet or timm.")
    bottom_up = _BOTTOM_UPS[fpn.BOTTOM_UP](cfg, input_shape)
    shapes = pick_features(bottom_up, fpn.IN_FEATURES, "MODEL.FPN.IN_FEATURES")
    if fpn.TOP_BLOCK != "none" and fpn.IN_FEATURES[-1] != "res5":
        raise ValueError(
            f"MODEL.FPN.TOP_BLOCK {fpn.TOP_BLOCK} builds on stride 32, but MODEL.FPN.IN_FEATURES "
            f"{list(fpn.IN_FEATURES)} does not end with res5; add it, or set TOP_BLOCK to none."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=head_norm(fpn.NORM),
        top_block=build_top_block(
            fpn.TOP_BLOCK, c5_channels=shapes[-1].channels, out_channels=fpn.OUT_CHANNELS
        ),
        fuse_type=fpn.FUSE_TYPE,
    )
