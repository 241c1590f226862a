"""What the comparison says: a verdict per arm, AP with intervals, where differences lie."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_det.experiments.page.charts import difference_chart
from kd_det.experiments.page.markup import Html, paragraph, section, table, tag
from kd_det.experiments.page.subject import Subject
from kd_det.experiments.pages import HEADERS, comparison_lines, finding, interval, row

_WORDS = {
    "gain": "AP rises: the interval lies above zero.",
    "loss": "AP falls: the interval lies below zero.",
    "no gain": "Neither zero is excluded nor anything as large as {practical:g} AP is left.",
    "inconclusive": "The interval holds zero and differences of {practical:g} AP and more.",
    "no verdict (one seed)": "The interval is over test images only; another seed might say the "
    "opposite.",
}


def verdicts(subject: Subject) -> Html:
    """Return a card for every arm that is compared with the baseline, and the other comparisons."""
    report = subject.report
    compared = [arm for arm in subject.arms if arm["delta"]]
    items = len(compared) + len(report["comparisons"])
    cards = [_card(arm["label"], arm["delta"], report["practical"], items) for arm in compared]
    lines = comparison_lines(report)[len(compared) :]
    return section(
        "verdicts",
        "Verdicts",
        paragraph(
            f"Each arm minus {report['baseline']}, paired over seeds and test images. Gain or "
            "loss: the 95 % interval excludes zero. No gain: it holds zero and nothing as large as "
            f"{report['practical']:g} AP. Inconclusive: it holds zero and something as large.",
            class_="soft",
        ),
        tag("div", *cards, class_="cards"),
        tag("ul", *(tag("li", line) for line in lines)) if lines else "",
        tag("div", difference_chart(report), class_="charts") if compared else "",
    )


def _card(label: str, delta: Mapping[str, Any], practical: float, comparisons: int) -> Html:
    verdict = delta["verdict"]
    holm = finding(delta, comparisons).removeprefix(verdict).strip(" ()")
    holm = f"It {holm}." if holm else ""
    return tag(
        "div",
        tag("p", verdict[:1].upper() + verdict[1:], class_="verdict"),
        tag("p", tag("strong", label)),
        tag("p", f"{interval(delta)} AP"),
        tag("p", _WORDS[verdict].format(practical=practical), " ", holm, class_="soft"),
        class_=f"card {verdict if verdict in ('gain', 'loss') else 'open'}",
    )


def numbers(subject: Subject) -> Html:
    """Return the table of report.md."""
    report = subject.report
    others = [{**t, "label": f"teacher {t['name']}"} for t in report["other_teachers"]]
    teachers = [{**report["teacher"], "label": "teacher"}, *others]
    several = len(report["arms"][0]["seeds"]) > 1
    return section(
        "numbers",
        "AP",
        table(HEADERS, [row(entry) for entry in (*teachers, *report["arms"])]),
        paragraph(
            "Box AP from 0 to 100, mean over the seeds"
            + (" ± sample standard deviation" if several else "")
            + ". Gap closed: share of the distance between the teacher and the baseline.",
            class_="soft",
        ),
    )


def breakdown(subject: Subject) -> Html:
    """Return the differences by class and by size of every arm, the worst first."""
    parts = []
    for place, arm in enumerate(subject.arms):
        if arm.get("classes") is None:
            continue
        tables = [_differences("class", arm["classes"]), _differences("size", arm["sizes"])]
        worst = arm["classes"][0] if arm["classes"] else None
        summary = f"{arm['label']}: worst {worst['name']} {worst['mean']:+.1f}" if worst else ""
        parts.append(
            tag("details", tag("summary", summary or arm["label"]), *tables, open=place == 1)
        )
    return section(
        "breakdown",
        "By class and by size",
        paragraph(
            "The worst differences come first. Of a class: paired, with a 95 % interval that is "
            "not corrected for the number of classes. Of a size (COCO's: below 32², below 96², and "
            "above, in pixels): with the least and the largest difference of a seed.",
            class_="soft",
        ),
        *parts,
    )


def _differences(what: str, entries: Sequence[Mapping[str, Any]]) -> Html:
    if not entries:
        return paragraph(f"The test set has no object of any {what}.")
    rows = [
        (one["name"], f"{one['baseline']:.1f}", f"{one['AP']:.1f}", _coloured(one))
        for one in entries
    ]
    return table((what, "baseline", "AP", "difference"), rows)


def _coloured(delta: Mapping[str, Any]) -> Html:
    """Return a difference, in the colour of a gain or a loss where its bounds agree."""
    kind = "gain" if delta["low"] > 0 else "loss" if delta["high"] < 0 else None
    return tag("span", interval(delta), class_=kind)
