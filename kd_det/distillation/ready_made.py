"""Teachers that need no training: meta-architectures that bring their weights themselves."""

import hashlib
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn


def is_ready_made(own_cfg: CfgNode) -> bool:
    """Return whether a teacher's config names a model with an attribute `ready_made` that holds."""
    return bool(getattr(_class_of(own_cfg), "ready_made", False))


def build_ready_made(own_cfg: CfgNode, weights: str) -> nn.Module:
    """
    Build such a model, loaded.

    Args:
        own_cfg: its plain config.
        weights: of KD.TEACHER.WEIGHTS; "auto" leaves them to the model's own keys, anything else
            goes to the class's `use_weights(cfg, weights)`.

    Raises:
        FileNotFoundError, ImportError, ValueError: from the model.
    """
    if weights != "auto":
        _class_of(own_cfg).use_weights(own_cfg, weights)
    model: nn.Module = build_model(own_cfg)
    return model


def digest_of(model: nn.Module) -> str:
    """Return the sha256 of a model's tensors and their names, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).numpy().tobytes())
    return digest.hexdigest()


def _class_of(own_cfg: CfgNode) -> Any:
    name = own_cfg.MODEL.META_ARCHITECTURE
    return META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
