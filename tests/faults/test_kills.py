"""kill -9 at any moment of a training or of a comparison loses nothing but time."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml
from faults.conftest import Tiny, equal_checkpoints, outcome
from faults.nursery import Nursery, words

from kd_det.engine.folder_lock import claimed
from kd_det.files import read_json
from kd_det.reading import what_damages

pytestmark = pytest.mark.faults
# Seconds for what takes less than one minute on a machine of one's own.
PATIENCE = 900
KILLS = 38
KILLS_OF_COMPARISONS = 12
Note = Callable[[str, object], None]


def test_killed_trainings(
    tiny: Tiny, children: Nursery, tmp_path: Path, record_property: Note
) -> None:
    """Repeated with --resume until done, each is the uninterrupted one bit for bit."""
    random.seed(0)
    begun = time.monotonic()
    assert children.run(*words(tiny.config, tmp_path / "whole")) == 0, children.said()
    length = time.monotonic() - begun
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run{runs}"
        code: int | None = None
        while code != 0:
            pid = children.start(*words(tiny.config, folder))
            # The last one is left alone.
            seconds = random.uniform(0, 0.9 * length) if kills < KILLS else 120
            code = children.wait(pid, seconds)
            if code is None:
                children.kill(pid)
                kills += 1
                check_files(folder)
            else:
                assert code == 0, children.said()
        assert tiny.same(folder)
        shutil.rmtree(folder)
        runs += 1
    record_property("tried", f"{kills} kill -9 of trainings, {runs} runs: all as uninterrupted")


def check_files(folder: Path) -> None:
    """Whatever bears its final name is whole at any moment."""
    for file in folder.glob("*.pth"):
        assert what_damages(file) == ""
    for name in ("result.json", "progress.json"):
        assert not (folder / name).exists() or read_json(folder / name) is not None
    tag = folder / "last_checkpoint"
    assert not tag.exists() or (folder / tag.read_text()).exists()


def write_recipe(folder: Path, entry: dict[str, str]) -> Path:
    """A teacher to be trained, students without and with it, one seed."""
    own = {"KD.DATASETS": [entry], "DATASETS.TEST": [entry["name"]], "SOLVER.MAX_ITER": 6}
    own |= {"SOLVER.CHECKPOINT_PERIOD": 2, "MODEL.FCOS.SCORE_THRESH_TEST": 0.0}
    tiny_runs.write_config(folder / "teacher.yaml", "fcos", own, r50=True)
    tiny_runs.write_config(folder / "plain.yaml", "fcos", own)
    student = tiny_runs.distil_keys(
        "fcos", tiny_runs.TinyTeacher(Path("teacher.yaml"), Path("auto"))
    )
    tiny_runs.write_config(folder / "distilled.yaml", "fcos", {**student, **own})
    recipe: dict[str, Any] = {"name": "tiny", "teacher": "teacher.yaml", "baseline": "none"}
    recipe |= {"seeds": [0], "arms": [{"name": "none", "config": "plain.yaml"}]}
    recipe["arms"].append({"name": "l2", "config": "distilled.yaml"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def finals(out: Path) -> dict[str, Path]:
    """The folders of all runs, by their names without the hash."""
    folders = [file.parent for file in out.glob("*/*/result.json")]
    return {folder.name.rsplit("-", 1)[0]: folder for folder in folders}


def test_killed_comparisons(
    tiny_data: dict[str, str], children: Nursery, tmp_path: Path, record_property: Note
) -> None:
    """Repeated until done: the same checkpoints, detections and report; no run left alive."""
    random.seed(1)
    recipe = write_recipe(tmp_path, tiny_data)
    begun = time.monotonic()
    whole = children.compare("--recipe", recipe, "--out", tmp_path / "whole", "--jobs", "2")
    assert children.wait(whole, PATIENCE) == 0, children.said()
    length = time.monotonic() - begun
    expected = finals(tmp_path / "whole")
    assert set(expected) == {"teacher", "none-seed0", "l2-seed0"}
    kills = comparisons = 0
    while kills < KILLS_OF_COMPARISONS:
        out = tmp_path / f"out{comparisons}"
        code: int | None = None
        while code != 0:
            last = kills >= KILLS_OF_COMPARISONS
            pid = children.compare("--recipe", recipe, "--out", out, "--jobs", "2")
            code = children.wait(pid, PATIENCE if last else random.uniform(0, 0.7 * length))
            if code is None:
                assert not last, children.said()
                children.kill(pid)
                kills += 1
            else:
                assert code == 0, children.said()
        check_comparison(out, tmp_path / "whole")
        comparisons += 1
    wait_until_ended(tmp_path)
    record_property("tried", f"{kills} kill -9 of compare, {comparisons} comparisons: all the same")


def check_comparison(out: Path, whole: Path) -> None:
    """Compare what two comparisons of one recipe left."""
    found, expected = finals(out), finals(whole)
    assert set(found) == set(expected)
    for name, folder in found.items():
        check_files(folder)
        assert outcome(folder) == outcome(expected[name])
        files = folder / "model_final.pth", expected[name] / "model_final.pth"
        # The teacher's path, which the student's file names, is another.
        assert name == "l2-seed0" or equal_checkpoints(*files)
    assert not list(out.glob("**/*.stale-*")) and not list(out.glob("**/*.damaged"))
    arms = [read_json(folder / "report.json") for folder in (out, whole)]
    deltas = [[arm.get("delta") for arm in (report or {})["arms"]] for report in arms]
    assert deltas[0] == deltas[1]


def wait_until_ended(folder: Path) -> None:
    """No process holds a run's folder any more."""
    for lock in folder.glob("**/.lock"):
        with claimed(str(lock.parent), patience=60):
            pass
