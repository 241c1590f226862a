"""How the arms came about: their training, their costs, and all that decides it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_det import zoo
from kd_det.config import changed_settings, load_config
from kd_det.experiments.digests import digest_of
from kd_det.experiments.environment import without_user_path
from kd_det.experiments.identity import data_identity
from kd_det.experiments.page.charts import training_chart
from kd_det.experiments.page.markup import Html, paragraph, section, table, tag
from kd_det.experiments.page.subject import Subject
from kd_det.experiments.pages import SHARES
from kd_det.experiments.plan import Run
from kd_det.experiments.pulls import rows as pull_rows
from kd_det.experiments.training_curves import Curve, loss_curves

_DASHES = ("-", "--", ":", "-.")
_DIGITS = 12


def training(subject: Subject) -> Html:
    """Return the courses of losses, gradient shares and cosines."""
    losses = [loss_curves([run.folder for run in subject.runs(arm)]) for arm in subject.arms]
    charts = []
    for kind, words in (("detection", "detection losses"), ("distillation", "distillation losses")):
        curves = [(i, "-", own[kind]) for i, own in enumerate(losses) if kind in own]
        charts += _chart(f"loss-{kind}", curves, label=words, caption=f"Sum of the {words}.")
    charts += _chart(
        "share",
        _pulls(subject, "share"),
        label="gradient share",
        caption="Gradient of each distiller over that of the detection losses, at the features.",
    )
    charts += _chart(
        "cosine",
        _pulls(subject, "cosine"),
        label="cosine",
        caption="Cosine of the angle between both gradients.",
        log=False,
    )
    rows = pull_rows(subject.report["arms"])
    return section(
        "training",
        "Training",
        paragraph("Medians over the seeds. An arm's second distiller is dashed.", class_="soft"),
        tag("div", *charts, class_="charts") if charts else paragraph("Nothing was logged."),
        table(SHARES, rows, words=2) if rows else "",
    )


def _chart(
    name: str, curves: list[tuple[int, str, Curve]], *, label: str, caption: str, log: bool = True
) -> list[Html]:
    if not curves:
        return []
    return [training_chart(name, curves, label=label, caption=caption, log=log)]


def _pulls(subject: Subject, quantity: str) -> list[tuple[int, str, Curve]]:
    return [
        (i, _DASHES[k % len(_DASHES)], {int(at): value for at, value in found[quantity]["curve"]})
        for i, arm in enumerate(subject.arms)
        for k, found in enumerate((arm["pull"] or {}).values())
        if quantity in found
    ]


def costs(subject: Subject) -> Html:
    """Return steps and memory."""
    report = subject.report
    rows = [
        (
            entry["label"],
            f"{entry['iterations']}",
            _number(entry["peak_memory_mb"], ".0f"),
        )
        for entry in ({**report["teacher"], "label": "teacher"}, *report["arms"])
    ]
    return section(
        "costs",
        "Steps and memory",
        table(("", "steps", "peak MB"), rows),
        paragraph(
            "Peak memory of the training process. Speeds are for kd-det bench: these runs shared "
            "the machine with each other.",
            class_="soft",
        ),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def provenance(subject: Subject) -> Html:
    """Return command, machine, runs, digests and configs."""
    report = subject.report
    runs = [(subject.plan.teacher, "teacher")]
    runs += [(run, arm["label"]) for arm in subject.arms for run in subject.runs(arm)]
    rows = [
        (label, str(run.seed), tag("code", run.folder.name), tag("code", _checkpoint(run)))
        for run, label in runs
    ]
    data = {f"{subject.truth.name} (annotations)": digest_of(str(subject.truth.json_file))}
    data |= data_identity(subject.plan.baseline_cfg)
    return section(
        "provenance",
        "How it was made",
        tag("pre", report["command"]),
        table(("machine and versions", ""), _known(report["environment"]), words=2),
        table(("run", "seed", "folder", "sha256 of the checkpoint"), rows, words=4),
        table(
            ("data", "sha256"),
            [(name, tag("code", digest[:_DIGITS])) for name, digest in data.items()],
            words=2,
        ),
        paragraph(
            "A folder's name ends with a hash of all that decides its run's outcome. Below, what "
            "each arm's config changes of the defaults.",
            class_="soft",
        ),
        _settings(subject.plan.teacher, "teacher"),
        *(_settings(subject.runs(arm)[0], arm["label"]) for arm in subject.arms),
    )


def _known(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in environment.items() if value is not None]


def _checkpoint(run: Run) -> str:
    """Return the digest of what a run trained, or of the weights that were evaluated."""
    if run.checkpoint.is_file():
        return digest_of(str(run.checkpoint))[:_DIGITS]
    weights = dict(zip(run.opts[::2], run.opts[1::2], strict=True)).get("MODEL.WEIGHTS", "")
    if weights.startswith(zoo.PREFIX):
        return zoo.find(weights).sha256[:_DIGITS]
    return digest_of(weights)[:_DIGITS] if Path(weights).is_file() else "-"


def _settings(run: Run, label: str) -> Html:
    changed = changed_settings(load_config(str(run.config_file), run.opts))
    shown = {key: _without_paths(value) for key, value in changed.items() if key != "OUTPUT_DIR"}
    text = yaml.safe_dump(shown, sort_keys=True, allow_unicode=True, default_flow_style=None)
    return tag("details", tag("summary", f"{label}: {run.config_file.name}"), tag("pre", text))


def _without_paths(value: Any) -> Any:
    """Return a setting as plain data that names no folder of the user."""
    if isinstance(value, str):
        return without_user_path(value)
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return value
