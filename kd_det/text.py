"""Phrases for messages."""

import difflib
from collections.abc import Iterable, Sequence

#: What a config, its plugins, models, data sets and checkpoints are refused with.
INPUT_ERRORS = (ImportError, KeyError, ValueError, OSError)


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """Return a phrase naming the valid names closest to `name` in any case, for error messages."""
    valid = sorted(set(valid))
    lower = {v.lower(): [w for w in valid if w.lower() == v.lower()] for v in valid}
    matches = difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.5)
    close = [v for match in matches for v in lower[match]][:count]
    if not close:
        tail = name.rsplit(".", 1)[-1]
        close = [v for v in valid if v.rsplit(".", 1)[-1] == tail][:count]
    return f"the nearest valid names are {', '.join(close or valid[:count])}"


def some(items: Sequence[str], count: int = 12) -> str:
    """Return the first of many items as a list in a sentence."""
    rest = f", ... and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + rest


def message_of(error: Exception) -> str:
    """Return what an error says; a KeyError would show its message as the key it is not."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
