"""Four mistakes that a run with an absent teacher would find when the teacher is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_runs
from tiny_runs import TinyTeacher


def _broken_test_set(folder: Path) -> dict[str, Any]:
    name = f"broken_{folder.name}"
    entry = tiny_runs.make_data(folder / "broken", images=2, name=name)
    content = json.loads(Path(entry["json"]).read_text())
    content["annotations"][1]["bbox"][2] = float("nan")
    Path(entry["json"]).write_text(json.dumps(content))
    return {"KD.DATASETS": [entry], "DATASETS.TEST": [name]}


#: What is wrong, the keys of a student that make it so, and what the message must say.
MISTAKES: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("distiller", lambda _: {"KD.DISTILLERS": ["FeatureLP"]}, r"FeatureLP.*FeatureLp"),
    ("capture", lambda _: {"KD.FEATURE_LP.STUDENT_CAPTURE": "backbon"}, r"backbon\b.*backbone"),
    (
        "pyramids",
        lambda _: {"KD.STUDENT.VIEW_FACTOR": 1.5},
        r"No level of the student's pyramid lies on the grid",
    ),
    ("test set", _broken_test_set, r"data set 'broken_test.*nan"),
]


def write_pair(folder: Path, student: dict[str, Any], teacher: dict[str, Any]) -> Path:
    """Write the configs of an absent teacher and of its student; return the latter's."""
    tiny_runs.write_config(folder / "teacher.yaml", "fcos", teacher, r50=True)
    keys = tiny_runs.distil_keys("fcos", TinyTeacher(Path("teacher.yaml"), Path("auto")))
    return tiny_runs.write_config(folder / "student.yaml", "fcos", {**keys, **student})
