"""The charts of the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from kd_det.evaluation.precision_curve import RECALLS
from kd_det.experiments.page.analysis import KINDS, Insight
from kd_det.experiments.page.markup import Html
from kd_det.experiments.page.svg import INK, LINE, SOFT, chart, series_colour
from kd_det.experiments.training_curves import Curve


def difference_chart(report: Mapping[str, Any]) -> Html:
    """Draw every arm's difference to the baseline with its interval."""
    arms = [(i, arm) for i, arm in enumerate(_ordered(report)) if arm["delta"]]
    practical = report["practical"]

    def draw(axes: Axes) -> None:
        axes.axvspan(-practical, practical, color=LINE, alpha=0.6, linewidth=0)
        axes.axvline(0, color=SOFT, linewidth=1)
        for row, (place, arm) in enumerate(arms):
            delta, colour = arm["delta"], series_colour(place)
            axes.plot([delta["low"], delta["high"]], [row, row], color=colour, linewidth=2)
            axes.plot(delta["mean"], row, "o", color=colour, markersize=6)
            axes.annotate(
                _shortened(arm["label"]), (0, row), (0, 8), textcoords="offset points",
                xycoords=("axes fraction", "data"), color=INK,
            )  # fmt: skip
        axes.set_ylim(len(arms) - 0.5, -0.8)
        axes.set_yticks([])
        axes.set_xlabel("AP minus the baseline's")
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)

    caption = (
        f"Difference to {report['baseline']} with its 95 % interval; the band is ±{practical:g} AP."
    )
    return chart("difference", draw, caption=caption, height=0.9 + 0.5 * len(arms))


def precision_recall_chart(insights: Sequence[Insight], teacher: Insight, iou: float) -> Html:
    """Draw precision over recall of all arms at an IoU."""

    def draw(axes: Axes) -> None:
        for colour, dashes, one in _with_teacher(insights, teacher):
            axes.plot(RECALLS, one.curves[iou], color=colour, linestyle=dashes, linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")

    caption = f"Precision over recall at IoU {iou:g}, mean over classes and seeds."
    return chart(f"precision-{round(100 * iou)}", draw, caption=caption)


def mistakes_chart(insights: Sequence[Insight]) -> Html:
    """Draw what each kind of mistake costs, a bar for each arm."""
    count = len(insights)

    def draw(axes: Axes) -> None:
        for i, one in enumerate(insights):
            rows = [k + 0.8 * (i + 0.5) / count - 0.4 for k in range(len(KINDS))]
            costs = [one.cost(kind) for kind in KINDS]
            axes.barh(rows, costs, height=0.8 / count, color=series_colour(i), linewidth=0)
        axes.set_yticks(range(len(KINDS)), KINDS)
        axes.set_ylim(len(KINDS) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("AP at IoU 0.5 to be had by putting them right")
        axes.grid(False, axis="y")

    caption = "What each kind of mistake costs."
    return chart("mistakes", draw, caption=caption, height=1.2 + 0.12 * count * len(KINDS))


def reliability_chart(insights: Sequence[Insight], teacher: Insight) -> Html:
    """Draw precision over confidence; on the diagonal, scores mean what they say."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        for colour, dashes, one in _with_teacher(insights, teacher):
            full = one.trust.counts > 0
            axes.plot(
                one.trust.confidence[full], one.trust.precision[full], color=colour,
                linestyle=dashes, marker="o", markersize=3.5, linewidth=1.6,
            )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="precision at IoU 0.5")

    return chart("reliability", draw, caption="Confidence against precision, ten bins of score.")


def training_chart(
    name: str, curves: Sequence[tuple[int, str, Curve]], *, label: str, caption: str, log: bool
) -> Html:
    """
    Draw a quantity over the iterations.

    Args:
        name: of the chart.
        curves: place of the arm, dashes, values by iteration.
        label: of the quantity.
        caption: below the chart.
        log: logarithmic, where all values are positive.
    """

    def draw(axes: Axes) -> None:
        for place, dashes, curve in curves:
            values = [value if math.isfinite(value) else math.nan for value in curve.values()]
            colour = series_colour(place)
            axes.plot(list(curve), values, color=colour, linestyle=dashes, linewidth=1.6)
        if log and all(value > 0 for _, _, curve in curves for value in curve.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="iteration", ylabel=label)

    return chart(name, draw, caption=caption)


def _with_teacher(insights: Sequence[Insight], teacher: Insight) -> list[tuple[str, str, Insight]]:
    """Return colour and dashes of the arms and the teacher."""
    arms = [(series_colour(place), "-", one) for place, one in enumerate(insights)]
    return [*arms, (INK, "--", teacher)]


def _ordered(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the arms, the baseline first: an arm's place is its colour."""
    return sorted(report["arms"], key=lambda arm: arm["name"] != report["baseline"])


def _shortened(label: str) -> str:
    return label if len(label) <= 48 else label[:47] + "…"
