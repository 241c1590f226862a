"""Which model a config means: the plain one, or the student inside kd_det's wrapper."""

import fnmatch

from detectron2.config import CfgNode

# What a KD.INHERIT that copies the whole of a backbone's feed-forward net matches.
_BOTTOM_UP = "backbone.bottom_up."


def student_cfg(cfg: CfgNode) -> CfgNode:
    """
    Return the plain Detectron2 config of the student: no KD keys, its own meta-architecture.

    A student of a reduced view gets test sizes divided by the factor, so that stock Detectron2
    feeds it images of the size it was trained for (a MIN_SIZE_TEST of 0, no resizing, stays: such
    images are to be reduced beforehand). A config without student only loses its KD keys.
    """
    out = cfg.clone()
    out.defrost()
    if is_distillation(cfg):
        factor = cfg.KD.STUDENT.VIEW_FACTOR
        out.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT.META_ARCHITECTURE
        out.INPUT.MIN_SIZE_TEST = round(cfg.INPUT.MIN_SIZE_TEST / factor)
        out.INPUT.MAX_SIZE_TEST = round(cfg.INPUT.MAX_SIZE_TEST / factor)
    del out["KD"]
    return out


def is_distillation(cfg: CfgNode) -> bool:
    """Return whether the config names kd_det's wrapper as meta-architecture."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "DistillationDetector")


def needs_teacher(cfg: CfgNode) -> bool:
    """Return whether a config distils or inherits."""
    return is_distillation(cfg) and bool(cfg.KD.DISTILLERS or cfg.KD.INHERIT)


def starts_trained(cfg: CfgNode) -> bool:
    """Return whether the student, or its net below the pyramid, starts from trained weights."""
    timm = cfg.MODEL.TIMM if cfg.MODEL.FPN.BOTTOM_UP == "timm" else None
    if cfg.MODEL.WEIGHTS or (timm and (timm.PRETRAINED or timm.WEIGHTS)):
        return True
    inherited = cfg.KD.INHERIT if is_distillation(cfg) else []
    return any(inherits(pattern, _BOTTOM_UP) for pattern in inherited)


def inherits(pattern: str, key: str) -> bool:
    """Return whether a pattern of KD.INHERIT, or a module path in its place, names a tensor."""
    return fnmatch.fnmatch(key, pattern) or key.startswith(pattern + ".")
