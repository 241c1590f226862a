"""What the page is about: a report, its runs, and what their detections tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_det.evaluation.matching import Objects
from kd_det.experiments.ground_truth import GroundTruth
from kd_det.experiments.page.analysis import Insight, analyse
from kd_det.experiments.plan import Plan, Run
from kd_det.experiments.report import Outcome


@dataclass(frozen=True)
class Subject:
    """
    What the page is about.

    Args:
        report: content of report.json.
        plan: the runs.
        truth: the test set.
        arms: of the report, the baseline first.
        insights: of these arms, in their order.
        teacher: of the teacher.
    """

    report: Mapping[str, Any]
    plan: Plan
    truth: GroundTruth
    arms: Sequence[Mapping[str, Any]]
    insights: Sequence[Insight]
    teacher: Insight

    def runs(self, arm: Mapping[str, Any]) -> list[Run]:
        """Return the runs of an arm."""
        return [self.plan.students[arm["name"], seed] for seed in arm["seeds"]]


def study(
    report: Mapping[str, Any], plan: Plan, outcomes: Mapping[Run, Outcome], truth: GroundTruth
) -> Subject:
    """Look at all detections; arguments as of the page."""
    objects = Objects.from_coco(truth.coco)
    arms = sorted(report["arms"], key=lambda arm: arm["name"] != report["baseline"])
    insights = [
        analyse(
            arm["label"],
            objects,
            [outcomes[plan.students[arm["name"], seed]].detections for seed in arm["seeds"]],
        )
        for arm in arms
    ]
    teacher = analyse("teacher", objects, [outcomes[plan.teacher].detections])
    return Subject(report, plan, truth, arms, insights, teacher)
