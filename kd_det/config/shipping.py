"""The config of a student that is deployed without kd_det."""

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from kd_det.config.roles import student_cfg

# Detectron2's builders that make what "build_fpn_backbone" makes of a ResNet, by TOP_BLOCK.
_BUILDERS = {
    "p6p7_c5": "build_retinanet_resnet_fpn_backbone",
    "maxpool": "build_resnet_fpn_backbone",
}


def stock_cfg(cfg: CfgNode) -> CfgNode:
    """
    Return the student's config with Detectron2's keys alone, for `get_cfg().merge_from_file`.

    The model has the same tensors under the same names. kd_det's builder of pyramids is replaced
    by Detectron2's where that makes the same.

    Args:
        cfg: full config of a run, or of a plain detector.

    Raises:
        ValueError: architecture or backbone are not Detectron2's; the message says what to do.
    """
    out = student_cfg(cfg)
    model = out.MODEL
    if model.BACKBONE.NAME == "build_fpn_backbone":
        model.BACKBONE.NAME = _builder(model) or model.BACKBONE.NAME
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        module = registry.get(name).__module__
        if not module.startswith("detectron2."):
            raise ValueError(
                f"{key} {name} is of {module} and not Detectron2's, which cannot build this "
                "student alone. Deploy it with kd_det: write `student_cfg(cfg).dump()`, and read "
                "it into `get_cfg()` after `kd_det.config.add_kd_config`."
            )
    _drop_unknown(out, get_cfg())
    return out


def _builder(model: CfgNode) -> str:
    """Return Detectron2's builder for what the config's pyramid is, "" where it has none."""
    resnets, fpn = model.RESNETS, model.FPN
    narrow = resnets.DEPTH < 50 and resnets.RES2_OUT_CHANNELS != 64
    if fpn.BOTTOM_UP != "resnet" or narrow or fpn.NORM == "GN":
        return ""
    return _BUILDERS.get(fpn.TOP_BLOCK, "")


def _drop_unknown(node: CfgNode, stock: CfgNode) -> None:
    for key in list(node):
        if key not in stock:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _drop_unknown(node[key], stock[key])
