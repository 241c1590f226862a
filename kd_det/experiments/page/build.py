"""The page as a whole, from a comparison's report, its runs and their detections."""

from collections.abc import Mapping
from typing import Any

from kd_det.experiments.ground_truth import GroundTruth
from kd_det.experiments.page import findings, looks, making
from kd_det.experiments.page.markup import Html, join, paragraph, tag
from kd_det.experiments.page.style import STYLE
from kd_det.experiments.page.subject import Subject, study
from kd_det.experiments.page.svg import series_variable
from kd_det.experiments.plan import Plan, Run
from kd_det.experiments.report import Outcome

# The page loads nothing and runs nothing, whatever a label holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(
    report: Mapping[str, Any], plan: Plan, outcomes: Mapping[Run, Outcome], truth: GroundTruth
) -> str:
    """
    Return report.html.

    Args:
        report: content of report.json.
        plan: the runs that it is about.
        outcomes: what each of them gave.
        truth: the test set.
    """
    subject = study(report, plan, outcomes, truth)
    sections = [
        findings.verdicts(subject),
        findings.numbers(subject),
        findings.breakdown(subject),
        looks.precision_recall(subject),
        looks.mistakes(subject),
        looks.reliability(subject),
        looks.images(subject),
        making.training(subject),
        making.costs(subject),
        making.provenance(subject),
    ]
    title = f"{report['name']}: comparison"
    links = join(tag("a", name, href=f"#{anchor}") for anchor, name in _CONTENTS)
    body = tag(
        "body",
        tag("h1", report["name"]),
        paragraph(_subtitle(report), class_="soft"),
        tag("nav", links),
        _key(subject),
        *sections,
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


_CONTENTS = (
    ("verdicts", "Verdicts"),
    ("numbers", "AP"),
    ("breakdown", "Classes and sizes"),
    ("precision", "Precision and recall"),
    ("mistakes", "Mistakes"),
    ("reliability", "Reliability"),
    ("images", "Images"),
    ("training", "Training"),
    ("costs", "Costs"),
    ("provenance", "How it was made"),
)


def _subtitle(report: Mapping[str, Any]) -> str:
    seeds = report["arms"][0]["seeds"]
    several = "seeds" if len(seeds) > 1 else "seed"
    environment = report["environment"]
    return (
        f"{len(report['arms'])} arms, {several} {', '.join(map(str, seeds))}, box AP on "
        f"{report['test_set']['name']} ({report['test_set']['images']} images), "
        f"{environment['date']}, kd_det {environment['kd_det']}"
    )


def _key(subject: Subject) -> Html:
    """Return which colour is whose, in all charts."""
    entries = [(series_variable(i), arm["label"]) for i, arm in enumerate(subject.arms)]
    swatches = [
        tag("span", tag("i", style=f"background: var({colour})"), label)
        for colour, label in [*entries, ("--ink", "teacher (dashed)")]
    ]
    return tag("div", *swatches, class_="key")
