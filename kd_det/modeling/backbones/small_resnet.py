"""
ResNet-18 and ResNet-34 of any width.

Detectron2's builder makes bottleneck nets (depth 50 and up) of any width, by STEM_OUT_CHANNELS,
RES2_OUT_CHANNELS and WIDTH_PER_GROUP, but insists on RES2_OUT_CHANNELS 64 for depths 18 and 34.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    ResNet,
    build_resnet_backbone,
)

from kd_det.modeling.norms import head_norm
from kd_det.modeling.registering import register_in

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@register_in(BACKBONE_REGISTRY)
def build_resnet_any_width_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    Build Detectron2's ResNet from MODEL.RESNETS, also at widths its own builder refuses.

    Args:
        cfg: a full config; depth 18 or 34 with RES2_OUT_CHANNELS other than 64 gives stages of
            1, 2, 4 and 8 times that width. Anything else is left to Detectron2's builder.
        input_shape: channels of the image.

    Raises:
        ValueError: a narrow R18/R34 with options that only bottleneck nets have.
    """
    resnets = cfg.MODEL.RESNETS
    width = resnets.RES2_OUT_CHANNELS
    if resnets.DEPTH not in _BLOCKS or width == 64:
        return build_resnet_backbone(cfg, input_shape)
    if any(resnets.DEFORM_ON_PER_STAGE) or resnets.RES5_DILATION != 1 or resnets.NUM_GROUPS != 1:
        raise ValueError(
            f"MODEL.RESNETS: depth {resnets.DEPTH} has no DEFORM_ON_PER_STAGE, RES5_DILATION or "
            "NUM_GROUPS; leave them at their defaults, or use depth 50 or more."
        )
    norm = head_norm(resnets.NORM)
    stem = BasicStem(
        in_channels=input_shape.channels, out_channels=resnets.STEM_OUT_CHANNELS, norm=norm
    )
    stages = []
    in_channels = resnets.STEM_OUT_CHANNELS
    for i, blocks in enumerate(_BLOCKS[resnets.DEPTH]):
        out_channels = width * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        in_channels = out_channels
    return ResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
