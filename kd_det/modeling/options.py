"""
Config keys beside the code that reads them.

A registered model may have `add_config(cls, cfg)`, which adds its own keys. Where they are many,
one frozen dataclass holds them: each field is the key of the same name in capitals, and the place
where its meaning, unit, default and source are written.
"""

from dataclasses import fields
from typing import Any, TypeVar

from detectron2.config import CfgNode

_Options = TypeVar("_Options")


def add_keys(parent: CfgNode, name: str, defaults: dict[str, Any]) -> None:
    """
    Add keys to the node `name`, which is made where it is absent; keys that exist keep their value.

    Args:
        parent: e.g. cfg.MODEL.
        name: of the node, in capitals.
        defaults: values by key, in capitals.
    """
    node = parent.setdefault(name, CfgNode())
    for key, value in defaults.items():
        node.setdefault(key, value)


def defaults_of(options: type) -> dict[str, Any]:
    """Return the defaults of an options class by key."""
    return {key.upper(): value for key, value in vars(options()).items()}


def read_options(options: type[_Options], node: CfgNode) -> _Options:
    """
    Build an options object from the node that has its keys.

    Raises:
        ValueError: a value that the options refuse.
    """
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    return options(**{name: node[name.upper()] for name in names})
