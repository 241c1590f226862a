"""Registering models beside a host that may have taken their names."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fvcore.common.registry import Registry

_logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=Callable[..., Any])


def register_in(registry: Registry) -> Callable[[_Model], _Model]:
    """
    Register the decorated class or function under its name, unless the name is taken.

    A host program, another project or a later Detectron2 may have registered that name before
    kd_det was imported. Its model stays, since the host's configs mean it; a warning says so, and
    how to have kd_det's as well.

    Args:
        registry: one of Detectron2's, e.g. META_ARCH_REGISTRY.

    Returns:
        The decorator; it returns what it decorates.
    """

    def register(model: _Model) -> _Model:
        name = model.__name__
        present = registry.get(name) if name in registry else None
        if present is None or present.__module__ == model.__module__:
            registry.register(model)
            return model
        _logger.warning(
            "%s was registered by %s before kd_det was imported, and stays: configs that name it "
            "mean that one. kd_det's own, with its keys, is left out; to have it too, register it "
            "under another name, as a subclass of %s.%s or a function that calls it.",
            name,
            present.__module__,
            model.__module__,
            name,
        )
        return model

    return register
