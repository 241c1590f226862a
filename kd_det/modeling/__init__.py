"""Detectors, backbones and necks that Detectron2 lacks. Importing it registers them."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from kd_det.modeling import feature_teacher  # noqa: F401
from kd_det.modeling.backbones import fpn, timm_backbone
from kd_det.modeling.dense import (  # noqa: F401
    atss,
    autoassign,
    ddod,
    decoding,
    fcos,
    fsaf,
    gfl,
    reppoints,
)
from kd_det.modeling.msad import aligned  # noqa: F401


def add_config(cfg: CfgNode) -> None:
    """
    Add the keys of the backbones and of every registered detector that brings some.

    A class in META_ARCH_REGISTRY, a plugin's included, brings its keys by a class method
    `add_config(cls, cfg)`. Keys that exist already keep their values.
    """
    fpn.add_backbone_config(cfg)
    timm_backbone.add_backbone_config(cfg)
    for _, model in META_ARCH_REGISTRY:
        add = getattr(model, "add_config", None)
        if add is not None:
            add(cfg)
