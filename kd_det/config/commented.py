"""Yaml as a person would write it: a comment beside each key."""

from collections.abc import Mapping
from typing import Any

import yaml


def commented_yaml(
    content: Mapping[str, Any], comments: Mapping[str, str], prefix: str = ""
) -> str:
    """
    Render nested mappings as yaml, values on one line each.

    Args:
        content: of strings, numbers, lists and mappings.
        comments: by full key, "KD.TEACHER.WEIGHTS"; what stands behind the value.
        prefix: full key of `content` itself, with its dot.
    """
    depth = "  " * prefix.count(".")
    text = ""
    for key, value in content.items():
        name = f"{depth}{_inline(key)}:"
        words = comments.get(f"{prefix}{key}")
        note = f"  # {words}" if words else ""
        if isinstance(value, Mapping) and value:
            text += f"{name}\n{commented_yaml(value, comments, f'{prefix}{key}.')}"
        elif isinstance(value, list) and value and all(isinstance(x, Mapping) for x in value):
            items = "".join(f"{depth}  - {_inline(item)}\n" for item in value)
            text += f"{name}{note}\n{items}"
        else:
            text += f"{name} {_inline(value)}{note}\n"
    return text


def _inline(value: Any) -> str:
    """Return a value as yaml on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
