"""Values of a distiller's keys, checked when it is built."""

import math
from typing import Any, get_args


def expect_choice(key: str, value: str, choices: Any) -> None:
    """
    Check a word.

    Args:
        key: the full key, e.g. "KD.PKD.SCOPE".
        value: what it has.
        choices: a `Literal` of what it may have.

    Raises:
        ValueError: something else.
    """
    if value not in get_args(choices):
        expected = " or ".join(map(repr, get_args(choices)))
        raise ValueError(f"{key} is {value!r}, expected {expected}.")


def expect_number(key: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """
    Check a number.

    Args:
        key: the full key.
        value: what it has.
        low, high: its range, both included.

    Raises:
        ValueError: outside, or not finite.
    """
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
        raise ValueError(f"{key} is {value}, expected {bound}.")
