"""How hard distillers pulled, read from the logs of runs."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kd_det.experiments.pages import pull_table
from kd_det.experiments.pulls import read_curves, summarize
from kd_det.experiments.share_chart import draw_shares, shares_inches


def write(folder: Path, shares: dict[int, float]) -> Path:
    folder.mkdir()
    lines = [
        json.dumps(
            {"iteration": i, "kd/ssim:head/grad_share": share, "kd/ssim:head/weight": 2, "lr": 0.1}
        )
        for i, share in shares.items()
    ]
    (folder / "metrics.json").write_text("\n".join([*lines, '{"iteration": 99, "kd/ssim:he']))
    return folder


def test_curves_of_a_killed_run(tmp_path: Path) -> None:
    curves = read_curves(write(tmp_path / "a", {0: 3.0, 20: 1.0}))
    assert curves == {"ssim:head": {"share": {0: 3.0, 20: 1.0}, "weight": {0: 2.0, 20: 2.0}}}
    assert read_curves(tmp_path) == {}


def test_medians_over_seeds(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", {0: 3.0, 20: 1.0, 40: 0.5}),
        write(tmp_path / "b", {0: 5.0, 20: 2.0, 40: 0.7}),
        tmp_path,
    ]
    found = summarize(folders)["ssim:head"]["share"]
    assert [found[part] for part in ("first", "middle", "last")] == pytest.approx([4.0, 1.5, 0.6])
    assert found["curve"] == [[0, 4.0], [20, 1.5], [40, 0.6]]


def test_table(tmp_path: Path) -> None:
    pull = summarize([write(tmp_path / "a", {0: 3.0, 20: 1.0})])
    arms = [{"label": "alone", "pull": {}}, {"label": "SSIM", "pull": pull}]
    text = pull_table({"arms": arms}, "github")
    assert "| SSIM | ssim:head" in text and "3 → 2 → 1" in text and "2 → 2 → 2" in text
    assert pull_table({"arms": arms[:1]}, "github") == ""


def test_the_chart_has_a_line_per_distiller(tmp_path: Path) -> None:
    pull = summarize([write(tmp_path / "a", {0: 3.0, 20: 1.0})])
    twice = {**pull, "l2": {"share": {"curve": [[0, 0.0], [20, 0.1]]}}}
    arms = [
        {"name": "none", "label": "alone", "pull": {}},
        {"name": "ssim", "label": "SSIM", "pull": pull},
        {"name": "both", "label": "both", "pull": twice},
    ]
    assert shares_inches(arms) == 2 and shares_inches(arms[:1]) == 0
    assert shares_inches([*arms, *[arms[1]] * 20]) > 3.5  # room for the legend
    axes = Figure().add_subplot()
    draw_shares(axes, arms, {"none": "grey", "ssim": "red", "both": "blue"})
    drawn = {str(line.get_label()): line for line in axes.lines if line.get_color() != "#6b7785"}
    assert list(drawn) == ["SSIM", "both: ssim:head", "both: l2"]
    assert list(drawn["SSIM"].get_ydata()) == [3.0, 1.0]
    assert list(drawn["both: l2"].get_xdata()) == [20]  # a share of zero has no logarithm
    styles = {line.get_linestyle() for name, line in drawn.items() if name.startswith("both")}
    assert len(styles) == 2
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert "1" in ticks and not any("$" in text for text in ticks)
