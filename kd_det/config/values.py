"""What values keys take: checked before yacs merges them, which names neither file nor remedy."""

import re
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

# Keys whose default, None, has no type: a distiller's weight, and how hard it pulls without one.
_WEIGHTS = re.compile(r"KD\.[^.]+\.(WEIGHT|SHARE)")
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def takes_float(key: str, now: Any) -> bool:
    """Return whether a key (the full one) that holds `now` takes numbers with a point."""
    return isinstance(now, float) or _WEIGHTS.fullmatch(key) is not None


def refuse_wrong_values(given: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """
    Refuse values of another kind than a key's.

    Args:
        given: values by full key, as a yaml file or the words of an override have them.
        now: the config's values by full key, before these are merged.
        source: for messages: the file, or where the overrides are from.

    Raises:
        ValueError: a value does not do; the message names the source, the key, and what would.
    """
    for key, raw in given.items():
        value = CfgNode._decode_cfg_value(raw)
        if _WEIGHTS.fullmatch(key):
            good, expected = value is None or _is_number(value), "a number, or leave it out"
        else:
            good, expected = _fits(value, now[key]), _what_fits(value, now[key])
        if not good:
            raise ValueError(f"{source}: {value!r} for config key: {key}; expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: Any, now: Any) -> bool:
    """Return whether a key that holds `now` takes a value; the rules are yacs's, less None."""
    if isinstance(now, list | tuple):
        return isinstance(value, list | tuple)
    if isinstance(now, float):
        return value is None or _is_number(value) or _reads_as_float(value)
    return value is None or now is None or type(value) is type(now)


def _reads_as_float(value: Any) -> bool:
    """Whether it is a word like inf."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _what_fits(value: Any, now: Any) -> str:
    if not isinstance(now, list | tuple):
        return _KINDS.get(type(now), type(now).__name__)
    if not isinstance(value, str):
        return "a list"
    words = [word.strip(" '\"") for word in value.strip("[]() ").split(",")]
    return f'a list, as "{words}"'
