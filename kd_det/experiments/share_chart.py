"""A chart of how hard each distiller pulled on its student while it was trained."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

Curve = Sequence[Sequence[float]]

_WIDTH = 24  # of the legend, in characters
_LINES = ("-", "--", ":", "-.")
_INK, _SOFT, _GRID = "#1f2933", "#6b7785", "#e4e8ec"


def shares_inches(arms: Sequence[Mapping[str, Any]]) -> float:
    """Return the height that the chart and its legend need; 0 where no arm logged a share."""
    lines = sum(label.count("\n") + 1 for _, label, _ in _labelled(arms))
    return max(2.0, 0.5 + 0.16 * lines) if lines else 0.0


def draw_shares(axes: Axes, arms: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """
    Draw the gradient share of every distiller of every arm over the iterations, on a log scale.

    Args:
        axes: where to draw.
        arms: of report.json.
        colours: per arm's name. Curves of one colour differ by their lines.
    """
    drawn: Counter[str] = Counter()
    for name, label, curve in _labelled(arms):
        shown = [(x, y) for x, y in curve if y > 0]
        axes.plot(
            [x for x, _ in shown], [y for _, y in shown], color=colours[name],
            linestyle=_LINES[drawn[colours[name]] % len(_LINES)], linewidth=1.4, label=label,
        )  # fmt: skip
        drawn[colours[name]] += 1
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


def _labelled(arms: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Curve]]:
    """Yield of every share the arm's name, the legend's text, the curve."""
    for arm in arms:
        pull = arm.get("pull") or {}
        curves = {name: found["share"]["curve"] for name, found in pull.items() if "share" in found}
        for name, curve in curves.items():
            label = arm["label"] if len(curves) == 1 else f"{arm['label']}: {name}"
            yield arm["name"], textwrap.fill(label, _WIDTH), curve
