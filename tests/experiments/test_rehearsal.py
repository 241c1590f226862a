"""`kd-det compare` finds mistakes of every arm before the first run starts."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rehearsals
import tiny_runs
import yaml

from kd_det.experiments import rehearsal, runs
from kd_det.experiments.plan import make_plan
from kd_det.experiments.recipe import RecipeError, read_recipe
from kd_det.experiments.rehearsal import rehearse_runs
from kd_det_cli import main

TESTED = {"DATASETS.TEST": [tiny_runs.DATA]}


def write_recipe(folder: Path, keys: dict[str, Any], **arm: Any) -> Path:
    """A teacher, plain students, good distilled ones, and an arm with the given keys."""
    rehearsals.write_pair(folder, TESTED, TESTED)
    tiny_runs.write_config(folder / "plain.yaml", "fcos", TESTED)
    content = {
        "name": "tiny",
        "teacher": "teacher.yaml",
        "baseline": "none",
        "seeds": [0, 1],
        "arms": [
            {"name": "none", "config": "plain.yaml"},
            {"name": "good", "config": "student.yaml"},
            {"name": "odd", "config": "odd.yaml", **arm},
        ],
    }
    student = tiny_runs.distil_keys(
        "fcos", tiny_runs.TinyTeacher(Path("teacher.yaml"), Path("auto"))
    )
    tiny_runs.write_config(folder / "odd.yaml", "fcos", {**student, **TESTED, **keys})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(autouse=True)
def _no_runs(tiny_data: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts nevertheless says so in its log and fails."""
    monkeypatch.setattr(runs, "RUNNER", ("sh", "-c", "echo a run was started; exit 1"))


@pytest.mark.parametrize(("kind", "keys", "message"), rehearsals.MISTAKES, ids=lambda x: str(x)[:9])
def test_a_mistake_stops_before_the_teacher_is_trained(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    keys: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    changed = keys(tmp_path)
    recipe = write_recipe(tmp_path, changed)
    if kind == "test set":  # every run of a recipe is evaluated on the same one
        for name in ("teacher", "student", "plain", "odd"):
            content = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
            content["DATASETS"]["TEST"] = changed["DATASETS.TEST"]
            content.setdefault("KD", {})["DATASETS"] = changed["KD.DATASETS"]
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    begun = time.monotonic()
    code = main(["compare", "--recipe", str(recipe), "--out", str(tmp_path / "out")])
    assert time.monotonic() - begun < 60
    err = capsys.readouterr().err
    assert code == 2
    assert "a run was started" not in err
    assert re.search(rf"(?s){message}", err)
    assert ("arm odd" if kind != "test set" else "teacher") in err
    assert not list((tmp_path / "out").rglob("*.pth"))


def test_classes_that_differ_stop_the_students_and_not_their_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher of features may know other classes; its AP is then its own affair."""
    kind, change, message = rehearsals.MISFITS[0]
    keys = rehearsals.odd_test_set(tmp_path, kind, change)
    recipe = write_recipe(tmp_path, {})
    content = yaml.safe_load(recipe.read_text())
    content["overrides"] = ["DATASETS.TEST", keys["DATASETS.TEST"]]
    content["overrides"] += ["KD.DATASETS", keys["KD.DATASETS"]]
    recipe.write_text(yaml.safe_dump(content))
    plan = make_plan(read_recipe(str(recipe)), tmp_path / "out")
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(RecipeError, match=rf"arm none .*{message}"):
        rehearse_runs(plan.runs, tmp_path / "out")
    assert re.search(message, caplog.text)  # of the teacher


@pytest.mark.parametrize(
    ("weights", "init_from", "message"),
    [
        ("", None, r"SOLVER.MAX_ITER is 0, .* no weights to evaluate; give it `init_from`"),
        ("/gone/weights.pth", None, r"/gone/weights\.pth does not exist"),
        ("", "good", ""),
    ],
)
def test_an_arm_to_evaluate_has_weights(
    tmp_path: Path, weights: str, init_from: str | None, message: str
) -> None:
    keys = {"SOLVER.MAX_ITER": 0, "MODEL.WEIGHTS": weights}
    recipe = write_recipe(tmp_path, keys, **({"init_from": init_from} if init_from else {}))
    plan = make_plan(read_recipe(str(recipe)), tmp_path / "out")
    odd = [run for run in plan.runs if run.name == "odd"]
    tmp_path.joinpath("out").mkdir()
    if not message:
        rehearse_runs(odd, tmp_path / "out")
        return
    with pytest.raises(RecipeError, match=rf"(?s)arm odd .*{message}.*Nothing was trained"):
        rehearse_runs(odd, tmp_path / "out")


def test_every_arm_once_for_all_seeds_and_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path, {"KD.INHERIT": ["head"], "MODEL.FPN.OUT_CHANNELS": 48}, init_from="none"
    )
    plan = make_plan(read_recipe(str(recipe)), tmp_path / "out")
    (tmp_path / "out").mkdir()
    rehearse_runs(plan.runs, tmp_path / "out")
    checked = capsys.readouterr().err.splitlines()
    names = ("teacher", "arm none", "arm good", "arm odd")
    assert checked == [f"Checking {name} ({i} of 4)" for i, name in enumerate(names, 1)]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("own", "used"), [("cuda", ["cpu", "cuda"]), ("cpu", ["cpu"])])
def test_what_no_cpu_can_do_is_checked_on_the_runs_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, used: list[str]
) -> None:
    devices = []

    def rehearse(cfg: Any, **options: Any) -> str:
        devices.append(cfg.MODEL.DEVICE)
        if devices[-1] == "cpu":
            raise NotImplementedError("Deformable Conv is not supported on CPUs!")
        return ""

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    recipe = write_recipe(tmp_path, {})
    plan = make_plan(read_recipe(str(recipe)), tmp_path / "out")
    (run,) = (run for run in plan.runs if (run.name, run.seed) == ("none", 0))
    run = dataclasses.replace(run, opts=(*run.opts, "MODEL.DEVICE", own))
    tmp_path.joinpath("out").mkdir()
    if own == "cuda":
        rehearse_runs([run], tmp_path / "out")
    else:
        with pytest.raises(RecipeError, match=r"NotImplementedError: Deformable Conv"):
            rehearse_runs([run], tmp_path / "out")
    assert devices == used
