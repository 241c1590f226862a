"""A chart of how hard each distiller pulled on its student while it was trained."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

_LINES = ("-", "--", ":", "-.")
_INK, _SOFT, _GRID = "#1f2933", "#6b7785", "#e4e8ec"


def has_shares(arms: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any arm logged a gradient share."""
    return any(_curves(arm) for arm in arms)


def draw_shares(axes: Axes, arms: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """
    Draw the gradient share of every distiller of every arm over the iterations, on a log scale.

    Args:
        axes: where to draw.
        arms: of report.json.
        colours: per arm's name. Several distillers of one arm differ by their lines.
    """
    for arm in arms:
        curves = _curves(arm)
        for i, (name, curve) in enumerate(curves.items()):
            shown = [(x, y) for x, y in curve if y > 0]
            label = arm["label"] if len(curves) == 1 else f"{arm['label']}: {name}"
            axes.plot(
                [x for x, _ in shown], [y for _, y in shown], color=colours[arm["name"]],
                linestyle=_LINES[i % len(_LINES)], linewidth=1.4, label=textwrap.fill(label, 24),
            )  # fmt: skip
    axes.axhline(1.0, color=_SOFT, linewidth=0.8, zorder=1)
    axes.set_yscale("log")
    # The scale's own labels are formulas, which the figure does not parse.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("iteration", fontsize=8.5, color=_SOFT)
    axes.set_title(
        "gradient share: a distiller's gradient at the student's features over that of the "
        "detection losses",
        fontsize=8.5, color=_SOFT, loc="left",
    )  # fmt: skip
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0, which="both")
    axes.grid(color=_GRID, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False, labelcolor=_INK
    )


def _curves(arm: Mapping[str, Any]) -> dict[str, list[Sequence[float]]]:
    """Return the curves of the shares of an arm's distillers."""
    pull = arm.get("pull") or {}
    return {name: found["share"]["curve"] for name, found in pull.items() if "share" in found}
