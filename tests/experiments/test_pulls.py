"""How hard distillers pulled, read from the logs of runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kd_det.experiments.pages import pull_table
from kd_det.experiments.pulls import extremes, read_curves, summarize
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


def test_arms_of_one_colour_differ_by_their_lines(tmp_path: Path) -> None:
    pull = summarize([write(tmp_path / "a", {0: 3.0, 20: 1.0})])
    arms = [{"name": x, "label": x, "pull": pull} for x in "abc"]
    axes = Figure().add_subplot()
    draw_shares(axes, arms, {"a": "red", "b": "blue", "c": "red"})
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines[:3]}
    assert len(looks) == 3


def test_a_pull_that_is_warmed_up_is_judged_when_it_has_risen(tmp_path: Path) -> None:
    """A share of 6 at the full weight is a share of 0.12 at a fiftieth of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"iteration": i, "kd/l1/grad_share": 0.12 * weight, "kd/l1/weight": weight}
        for i, weight in ((9, 1.0), (250, 25.0), (499, 50.0), (999, 50.0))
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (line,) = extremes([{"label": "a", "pull": summarize([folder])}])
    assert "at first l1 pulls 6 times" in line and "too hard" in line


def test_an_extreme_pull_is_told_with_its_remedy() -> None:
    def arm(label: str, **first: float) -> dict[str, Any]:
        pull = {name: {"share": {"first": share}} for name, share in first.items()}
        return {"label": label, "pull": {**pull, "unmeasured": {}}}

    arms = [arm("a", ssim=3.1, l2=0.01), arm("b", ssim=7700.0), arm("c", pgd=0.001), {"label": "d"}]
    lines = extremes(arms)
    assert [line.split(":")[0] for line in lines] == ["b", "c"]
    assert "ssim pulls 7.7e+03 times" in lines[0] and "without a WEIGHT" in lines[0]
    assert "pgd pulls 0.001 times" in lines[1] and "next to nothing" in lines[1]
