"""What the detections look like: curves, mistakes, reliability, images."""

import math
from collections.abc import Sequence
from pathlib import Path

from kd_det.experiments.page.analysis import IOUS, KINDS, Insight
from kd_det.experiments.page.charts import (
    mistakes_chart,
    precision_recall_chart,
    reliability_chart,
)
from kd_det.experiments.page.markup import Html, paragraph, section, table, tag
from kd_det.experiments.page.pictures import (
    KEY,
    detections_on,
    image_files,
    most_changed,
    objects_on,
    picture,
)
from kd_det.experiments.page.subject import Subject


def precision_recall(subject: Subject) -> Html:
    """Return precision over recall at IoU 0.5 and 0.75."""
    charts = [precision_recall_chart(subject.insights, subject.teacher, iou) for iou in IOUS]
    return section("precision", "Precision and recall", tag("div", *charts, class_="charts"))


def mistakes(subject: Subject) -> Html:
    """Return how often each kind of mistake occurs, and its cost."""
    rows = [
        [one.label, *(f"{one.cost(kind):.1f} ({one.count(kind):.0f})" for kind in KINDS)]
        for one in (subject.teacher, *subject.insights)
    ]
    return section(
        "mistakes",
        "Mistakes",
        paragraph(
            "TIDE's kinds. A detection that is no match at IoU 0.5 is a localisation mistake (0.1 "
            "to 0.5 with an object of its class), one of classification (0.5 or more with another "
            "class), a duplicate, background (below 0.1 with everything), or both badly placed and "
            "of the wrong class. Missed: an object that no match, localisation or classification "
            "mistake points at. The cost is how much AP at IoU 0.5 rises if this kind alone is put "
            "right; costs do not add up. In brackets, how many.",
            class_="soft",
        ),
        tag("div", mistakes_chart(subject.insights), class_="charts"),
        table(("", *KINDS), rows),
    )


def reliability(subject: Subject) -> Html:
    """Return confidence against precision."""
    rows = [
        [
            one.label,
            "-" if math.isnan(one.trust.error) else f"{one.trust.error:.3f}",
            f"{one.detections:.0f}",
        ]
        for one in (subject.teacher, *subject.insights)
    ]
    return section(
        "reliability",
        "Reliability",
        paragraph(
            "Whether a score means what it says: of detections with confidence 0.7, seven of ten "
            "should match an object at IoU 0.5. Expected calibration error: mean distance between "
            "confidence and precision over all detections, in ten bins.",
            class_="soft",
        ),
        tag(
            "div",
            reliability_chart(subject.insights, subject.teacher),
            table(("", "calibration error", "detections"), rows),
            class_="charts",
        ),
    )


def images(subject: Subject) -> Html:
    """Return for every arm the images of its largest gain and its largest loss."""
    names = [subject.truth.category_names[i] for i in subject.teacher.first.test_set.category_ids]
    files = image_files(subject.truth.coco, subject.truth.image_root)
    baseline = subject.insights[0]
    blocks = [
        _block(kind, place, [baseline, arm, subject.teacher], names, files[place])
        for arm in subject.insights[1:]
        for kind, place in most_changed(arm, baseline)
    ]
    key = [tag("span", tag("i", style=f"background: {c}"), words) for c, words in KEY]
    return section(
        "images",
        "Images that changed most",
        paragraph(
            "Of each arm the test image with the largest gain and the one with the largest loss "
            "against the baseline, first seed. An image's score is F1 in which a match counts its "
            "IoU: 2 · sum of IoU / (objects + boxes). Every model's boxes are shown, and counted, "
            "above the score at which its F1 over the whole test set is highest.",
            class_="soft",
        ),
        tag("div", *key, class_="key"),
        *(blocks or [paragraph("No image changed.")]),
    )


def _block(
    kind: str, place: int, models: Sequence[Insight], names: Sequence[str], file: Path
) -> Html:
    baseline, arm, _ = models
    scores = f"{baseline.scores[place]:.2f} → {arm.scores[place]:.2f}"
    panels = [picture(file, objects_on(baseline.first, place, names), title="ground truth")]
    for one in models:
        title = f"{one.label} (above {one.threshold:.2f})"
        panels.append(picture(file, detections_on(one, place, names), title=title))
    return tag(
        "div",
        tag("h3", f"{arm.label}: largest {kind}, {scores} on {file.name}"),
        tag("div", *panels, class_="panels"),
    )
