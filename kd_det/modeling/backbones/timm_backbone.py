"""
Any backbone of the timm library (MobileNetV2, EfficientNet, ...) as a Detectron2 backbone.

timm's pretrained weights take RGB images normalised by timm's mean and std. With
MODEL.TIMM.PRETRAINED set INPUT.FORMAT "RGB" and, for most of them, MODEL.PIXEL_MEAN
[123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from kd_det.modeling.options import add_keys
from kd_det.modeling.registering import register_in


class TimmBackbone(Backbone):
    """
    The feature pyramid of a timm model, levels named by stride: res2 (4) to res5 (32).

    Args:
        name: a model name of timm, e.g. "mobilenetv2_100".
        pretrained: download timm's ImageNet weights.
        in_channels: channels of the image.
        out_features: names of the levels to return.

    Raises:
        ImportError: timm is not installed.
        ValueError: the model has no level of a wanted name.
    """

    def __init__(
        self, *, name: str, pretrained: bool, in_channels: int, out_features: Sequence[str]
    ) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"The backbone {name} comes from timm, which is not installed: run "
                "`pip install 'timm>=1.0'` (kd_det's extra `timm`)."
            ) from error
        body: Any = timm.create_model(
            name, pretrained=pretrained, in_chans=in_channels, features_only=True
        )
        strides, channels = body.feature_info.reduction(), body.feature_info.channels()
        self.body = body
        # A power of two is one bit longer than its exponent: stride 4 is res2.
        self._levels = [f"res{stride.bit_length() - 1}" for stride in strides]
        self._out_features = list(out_features)
        missing = set(out_features) - set(self._levels)
        if missing:
            raise ValueError(
                f"MODEL.TIMM.OUT_FEATURES names {sorted(missing)}, but {name} has {self._levels} "
                f"(strides {strides})."
            )
        self._out_feature_strides = dict(zip(self._levels, strides, strict=True))
        self._out_feature_channels = dict(zip(self._levels, channels, strict=True))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {level: map (N, C, H / stride, W / stride)} for images (N, in_channels, H, W)."""
        maps = dict(zip(self._levels, self.body(x), strict=True))
        return {level: maps[level] for level in self._out_features}


def add_backbone_config(cfg: CfgNode) -> None:
    """Add MODEL.TIMM."""
    keys: dict[str, Any] = {}
    # Model name in timm (extra `kd_det[timm]`).
    keys["NAME"] = "mobilenetv2_100"
    # Download timm's ImageNet weights. They take RGB: set INPUT.FORMAT "RGB" and, for most models,
    # MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].
    keys["PRETRAINED"] = False
    # Levels the model returns, named by stride: res2 is stride 4, res5 is stride 32.
    keys["OUT_FEATURES"] = ["res2", "res3", "res4", "res5"]
    add_keys(cfg.MODEL, "TIMM", keys)


@register_in(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """
    Build `TimmBackbone` from MODEL.TIMM.

    Args:
        cfg: a full config.
        input_shape: channels of the image.

    Raises:
        ValueError: MODEL.BACKBONE.FREEZE_AT asks for frozen stages, which timm models do not have.
    """
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, but a timm backbone "
            "trains all its layers; set it to 0."
        )
    return TimmBackbone(
        name=cfg.MODEL.TIMM.NAME,
        pretrained=cfg.MODEL.TIMM.PRETRAINED,
        in_channels=input_shape.channels,
        out_features=cfg.MODEL.TIMM.OUT_FEATURES,
    )
