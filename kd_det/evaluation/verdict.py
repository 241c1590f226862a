"""What differences allow to say, one by one and together."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from kd_det.evaluation.difference import Difference

Verdict = Literal["gain", "loss", "no gain", "inconclusive", "no verdict (one seed)"]


def verdict(difference: Difference, *, practical: float = 0.3) -> Verdict:
    """
    Say in words what a difference shows.

    Args:
        difference: with its interval.
        practical: AP points; a difference below it does not matter.

    Returns:
        "gain" or "loss": the interval excludes zero, however small the difference. "no gain": it
        contains zero, and nothing as large as `practical`. "inconclusive": it contains zero and
        something as large. "no verdict (one seed)": another seed might have said the opposite.

    Raises:
        ValueError: `practical` is not positive.
    """
    if practical <= 0:
        raise ValueError(f"practical is {practical}; expected AP points above 0")
    if difference.seeds == 1:
        return "no verdict (one seed)"
    if difference.low > 0:
        return "gain"
    if difference.high < 0:
        return "loss"
    if -practical < difference.low and difference.high < practical:
        return "no gain"
    return "inconclusive"


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """
    Adjust p values of several comparisons so that one wrong finding among all is as rare as of one.

    Holm (1979): the k-th smallest of m is multiplied by m - k + 1, and is no smaller than the one
    before it. A finding holds at 5 % if its adjusted p is below 0.05.

    Args:
        p_values: each from 0 to 1; None (no test was made) does not count and stays None.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted


def judge(differences: Sequence[Difference], *, practical: float = 0.3) -> list[dict[str, Any]]:
    """
    Judge all comparisons of one report, as they stand in its file.

    Args:
        differences: every comparison that the report makes, each once.
        practical: as for `verdict`.

    Returns:
        For each the fields of `Difference`, "method", "holm" (p adjusted for the number of
        comparisons; None where p is) and "verdict" (of the comparison alone).
    """
    adjusted = holm([difference.p for difference in differences])
    return [
        {**asdict(d), "method": d.method, "holm": p, "verdict": verdict(d, practical=practical)}
        for d, p in zip(differences, adjusted, strict=True)
    ]
