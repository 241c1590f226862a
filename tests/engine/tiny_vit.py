"""
A LazyConfig of a tiny ViTDet: a plain ViT, a simple feature pyramid on its last map, a RetinaNet.

ViT and pyramid are Detectron2's where it has them (its main branch), else the stand-ins below.
"""

from typing import Any

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import Tensor, nn

CHANNELS = 48
SCALES = [2.0, 1.0, 0.5]  # of stride 16: p3, p4, p5


class PlainViT(Backbone):
    """Patches of 16 pixels through one block of attention; one map of stride 16."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, embed_dim, 16, 16)
        self.block = nn.TransformerEncoderLayer(embed_dim, 2, 2 * embed_dim, batch_first=True)
        self._out_features = ["last_feat"]
        self._out_feature_channels = {"last_feat": embed_dim}
        self._out_feature_strides = {"last_feat": 16}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.patches(x)
        tokens = self.block(maps.flatten(2).transpose(1, 2))
        return {"last_feat": tokens.transpose(1, 2).reshape(maps.shape)}


class PlainPyramid(Backbone):
    """The last map, resampled by each factor, with a convolution of its own."""

    size_divisibility = 32

    def __init__(self, net: Backbone, out_channels: int, scale_factors: list[float]) -> None:
        super().__init__()
        self.net, self.scales = net, list(scale_factors)
        channels = net.output_shape()["last_feat"].channels
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for _ in self.scales)
        self._out_features = ["p3", "p4", "p5"]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {"p3": 8, "p4": 16, "p5": 32}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        last = self.net(x)["last_feat"]
        maps = [
            conv(nn.functional.interpolate(last, scale_factor=scale))
            for conv, scale in zip(self.laterals, self.scales, strict=True)
        ]
        return dict(zip(self._out_features, maps, strict=True))


def _backbone() -> Any:
    try:
        from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
    except ImportError:  # Detectron2 0.6
        net = L(PlainViT)(embed_dim=CHANNELS)
        return L(PlainPyramid)(net=net, out_channels=CHANNELS, scale_factors=SCALES)
    net = L(ViT)(img_size=64, embed_dim=CHANNELS, depth=2, num_heads=2, drop_path_rate=0.1)
    return L(SimpleFeaturePyramid)(
        net=net, in_feature="last_feat", out_channels=CHANNELS, scale_factors=SCALES
    )


model = L(RetinaNet)(
    backbone=_backbone(),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=CHANNELS)] * len(SCALES),
        num_classes=2,
        conv_dims=(CHANNELS,),
        num_anchors=1,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[32], [64], [128]], aspect_ratios=[1.0], strides=[8, 16, 32]
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=2,
    head_in_features=["p3", "p4", "p5"],
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
