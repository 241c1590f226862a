"""
Draw docs/figures/methods.png: gain, cost, memory and extra parameters of all methods.

    python benchmarks/methods_figure.py

From the committed reports of `kd-det compare --recipe configs/methods/recipe.yaml` and
`kd-det bench step --images 1`.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Method: its arm with the default share, and what that is compared with.
ARMS = {
    "FeatureLp": ("l2_.3", "none"),
    "SSIM": ("ssim_.3", "none"),
    "PGD": ("pgd_.3", "none"),
    "PKD": ("pkd_.3", "none"),
    "CWD": ("cwd_.3", "none"),
    "FRS": ("frs_.3", "none"),
    "BCKD": ("bckd_1", "none"),
    "CrossKD": ("crosskd_1", "none"),
    "MGD": ("mgd_.3", "none"),
    "FGD": ("fgd_1", "none"),
    "LD": ("ld_1", "gfl"),
}
INK, SOFT, COLOUR = "#1f2933", "#6b7785", "#0072b2"


def main() -> None:
    """Read both reports and write the figure."""
    report = json.loads((RESULTS / "methods" / "report.json").read_text())
    step = json.loads((RESULTS / "step" / "cpu.json").read_text())
    gains = [_gain(report, *ARMS[method]) for method in ARMS]
    rows = {row["part"]: row for row in step["rows"]}
    costs = [
        ("of the student's step, %", [100 * rows[method]["share"] for method in ARMS]),
        ("peak memory, MB", [rows[method]["peak_mb"] for method in ARMS]),
        ("extra parameters, million", [rows[method]["parameters"] / 1e6 for method in ARMS]),
    ]
    figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 4, sharey=True, width_ratios=[2, 1, 1, 1])
    places = range(len(ARMS))
    first.barh(places, [gain["mean"] for gain in gains], color=COLOUR, height=0.6)
    low = [gain["mean"] - gain["low"] for gain in gains]
    high = [gain["high"] - gain["mean"] for gain in gains]
    means = [gain["mean"] for gain in gains]
    first.errorbar(means, places, xerr=[low, high], fmt="none", ecolor=INK, capsize=3)
    first.axvline(0, color=INK, linewidth=0.8)
    first.set_title("AP gained, 95 % interval", fontsize=9, color=INK)
    first.set_yticks(places, [f"{m} (on GFL)" if m == "LD" else m for m in ARMS])
    first.invert_yaxis()
    for axes, (title, values) in zip(others, costs, strict=True):
        bars = axes.barh(places, values, color=SOFT, height=0.6)
        axes.bar_label(bars, fmt="%.2g", padding=2, fontsize=8, color=INK)
        axes.set_title(title, fontsize=9, color=INK)
        axes.margins(x=0.25)
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, color=SOFT)
    figure.savefig(ROOT / "docs" / "figures" / "methods.png")


def _gain(report: dict[str, Any], arm: str, against: str) -> dict[str, float]:
    """Return mean and interval of the difference of an arm to its control."""
    pairs = {(arm["name"], "none"): arm["delta"] for arm in report["arms"]}
    pairs |= {(pair["arm"], pair["against"]): pair["delta"] for pair in report["comparisons"]}
    return dict(pairs[arm, against])


if __name__ == "__main__":
    main()
