"""The figure of a comparison: AP of every arm, how hard each was pulled, a few test images."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from kd_det.experiments.ground_truth import GroundTruth
from kd_det.experiments.pages import interval
from kd_det.experiments.share_chart import draw_shares, shares_inches

_SCORE = 0.4  # detections above it are drawn
_IMAGES = 2
_AP_COLUMN, _GAIN_COLUMN = 1.025, 1.095  # in widths of the chart
_INK, _SOFT, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_BASELINE_COLOUR, _TEACHER_COLOUR = "#8793a0", "#1f2933"
# Colours that stay apart for colour-blind readers (Okabe and Ito), on light ground.
_ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_CLASS_COLOURS = (
    "#ff4d4d", "#4dd2ff", "#ffe14d", "#7dff6b", "#ff8cf0", "#ffa64d", "#b9a5ff",
    "#4d79ff", "#00e6a8", "#c8a27a",
)  # fmt: skip


def draw_report(
    report: Mapping[str, Any],
    truth: GroundTruth,
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    file: BinaryIO,
) -> None:
    """
    Draw a report.

    Args:
        report: content of report.json.
        truth: the test set.
        detections: arm name -> COCO results of its first seed.
        file: where to write the PNG.
    """
    arms = report["arms"]
    chart_inches = 0.9 + 0.42 * len(arms)
    shares = shares_inches(arms)
    images_inches = 2.05
    heights = [h for h in (chart_inches, shares, images_inches) if h]
    with rc_context({"text.parse_math": False}):  # a label may hold dollars
        figure = Figure(figsize=(10, sum(heights)), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        chart, strip = rows[0], rows[-1]
        axes = chart.add_axes((0.235, 0.55 / chart_inches, 0.55, 1 - 0.85 / chart_inches))
        _draw_chart(axes, report)
        if shares:
            place = 0.235, 0.48 / shares, 0.55, 1 - 0.8 / shares
            draw_shares(rows[1].add_axes(place), arms, arm_colours(report))
        _draw_images(strip, report, truth, detections)
        figure.savefig(file, format="png")


def _draw_chart(axes: Axes, report: Mapping[str, Any]) -> None:
    """One row per arm: mean as a bar, interval of the gain as a whisker, seeds as dots below it."""
    arms, teacher = report["arms"], report["teacher"]["mean"]["AP"]
    base = next(arm for arm in arms if arm["name"] == report["baseline"])["mean"]["AP"]
    colours = arm_colours(report)
    ends = [base + arm["delta"]["high"] for arm in arms if arm["delta"]]
    right = 1.08 * max([teacher, *ends, *(v for arm in arms for v in arm["AP"])])
    for y, arm in enumerate(arms):
        _draw_arm(axes, y, arm, base, colours[arm["name"]])
    axes.axvline(teacher, color=_TEACHER_COLOUR, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    headers = [
        (teacher, f"teacher {teacher:.1f}", axes.get_xaxis_transform(), "right", _TEACHER_COLOUR),
        (_AP_COLUMN, "AP", axes.transAxes, "left", _SOFT),
        (_GAIN_COLUMN, "gain [95 % interval]", axes.transAxes, "left", _SOFT),
    ]
    for x, text, transform, align, colour in headers:
        # In points above the chart, which may be high.
        axes.annotate(
            text, (x, 1), (0, 4), xycoords=transform, textcoords="offset points",
            ha=align, va="bottom", fontsize=8.5, color=colour,
        )  # fmt: skip
    labels = [textwrap.fill(arm["label"], 28) for arm in arms]
    axes.set_yticks(range(len(arms)), labels, fontsize=9.5, color=_INK)
    axes.set_ylim(len(arms) - 0.45, -0.55)
    axes.set_xlim(0, max(right, 1.0))
    legend = f"box AP on {report['test_set']['images']} test images   ○ a seed"
    over = "" if len(arms[0]["seeds"]) > 1 else ", over test images only"
    axes.set_xlabel(f"{legend}   ├─┤ 95 % interval of the gain{over}", fontsize=8.5, color=_SOFT)
    _strip(axes)


def _draw_arm(axes: Axes, y: int, arm: Mapping[str, Any], base: float, colour: str) -> None:
    """Draw the row `y` of an arm; `base` is the baseline's AP."""
    mean, delta = arm["mean"]["AP"], arm["delta"]
    axes.barh(y, mean, height=0.58, color=colour, alpha=0.9, zorder=2)
    if delta:
        low, high = base + delta["low"], base + delta["high"]
        axes.errorbar(
            mean, y - 0.08, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
            color=_INK, capsize=3, linewidth=1.2, zorder=3,
        )  # fmt: skip
    axes.scatter(
        arm["AP"], [y + 0.15] * len(arm["AP"]), s=16, color="white", edgecolors=_INK,
        linewidths=0.9, zorder=4,
    )  # fmt: skip
    gain = interval(delta) if delta else "baseline"
    for x, text in ((_AP_COLUMN, f"{mean:.1f}"), (_GAIN_COLUMN, gain)):
        axes.text(
            x, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_INK
        )


def _strip(axes: Axes) -> None:
    """Leave of the axes a light grid and their labels."""
    axes.tick_params(axis="x", colors=_SOFT, labelsize=8.5, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def arm_colours(report: Mapping[str, Any]) -> dict[str, str]:
    """Return a colour per arm: grey for the baseline, the palette in the recipe's order."""
    others = [arm["name"] for arm in report["arms"] if arm["name"] != report["baseline"]]
    colours = {name: _ARM_COLOURS[i % len(_ARM_COLOURS)] for i, name in enumerate(others)}
    return {**colours, report["baseline"]: _BASELINE_COLOUR}


def _draw_images(
    strip: Any,
    report: Mapping[str, Any],
    truth: GroundTruth,
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Ground truth, the baseline's detections, and the best other arm's, for each image."""
    rivals = [arm for arm in report["arms"] if arm["delta"]]
    best = max(rivals, key=lambda arm: arm["mean"]["AP"], default=None)
    columns: list[tuple[str, str, Sequence[Mapping[str, Any]]]] = [
        ("ground truth", _INK, truth.coco["annotations"]),
    ]
    colours = arm_colours(report)
    baseline = next(arm for arm in report["arms"] if arm["name"] == report["baseline"])
    for arm in [baseline, best] if best else [baseline]:
        boxes = [item for item in detections[arm["name"]] if item["score"] > _SCORE]
        columns.append((arm["label"], colours[arm["name"]], boxes))
    images = pick_images(truth, _IMAGES)
    groups = strip.add_gridspec(
        1, len(images), left=0.012, right=0.988, bottom=0.17, top=0.87, wspace=0.05
    )
    palette = {
        category: _CLASS_COLOURS[i % len(_CLASS_COLOURS)]
        for i, category in enumerate(sorted(truth.category_names))
    }
    for group, image in zip(groups, images, strict=True):
        panels = group.subgridspec(1, len(columns), wspace=0.04)
        for panel, (title, colour, items) in zip(panels, columns, strict=True):
            boxes = [item for item in items if item["image_id"] == image["id"]]
            axes = strip.add_subplot(panel)
            _draw_boxes(axes, truth.image_root / image["file_name"], boxes, palette)
            size = min(8.5, 8.5 * 20 / len(title))  # 20 letters are as wide as a panel
            axes.set_title(title, fontsize=size, color=colour, pad=4, fontweight="bold")
    _draw_legend(strip, truth, palette)


def _draw_boxes(
    axes: Axes, file: Path, boxes: Sequence[Mapping[str, Any]], palette: Mapping[int, str]
) -> None:
    with Image.open(file) as image:  # boxes are annotated on the upright image
        axes.imshow(ImageOps.exif_transpose(image).convert("RGB"))
    axes.set_axis_off()
    for item in boxes:
        x, y, width, height = item["bbox"]
        for colour, thickness in (("black", 2.4), (palette[item["category_id"]], 1.3)):
            axes.add_patch(
                Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=thickness)
            )


def _draw_legend(strip: Any, truth: GroundTruth, palette: Mapping[int, str]) -> None:
    handles = [
        Line2D([], [], color=palette[category], linewidth=3, label=name)
        for category, name in sorted(truth.category_names.items())
    ]
    strip.legend(
        handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False,
        labelcolor=_SOFT, handlelength=1.0, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def pick_images(truth: GroundTruth, count: int) -> list[dict[str, Any]]:
    """
    Choose test images to show, by their annotations alone, so that no result is picked.

    Args:
        truth: the test set.
        count: how many images.

    Returns:
        Up to `count` images spread evenly over those with three objects or more (over all images,
        if none has as many).
    """
    objects: dict[int, int] = {}
    for item in truth.coco["annotations"]:
        objects[item["image_id"]] = objects.get(item["image_id"], 0) + 1
    images = sorted(truth.coco["images"], key=lambda image: image["id"])
    full = [image for image in images if objects.get(image["id"], 0) >= 3] or images
    count = min(count, len(full))
    return [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]
