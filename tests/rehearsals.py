"""Four mistakes that a run with an absent teacher would find when the teacher is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_runs
from tiny_runs import TinyTeacher


def odd_test_set(folder: Path, kind: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Make a test set whose annotations are changed; return the keys that name it."""
    name = f"{kind}_{folder.name}"
    entry = tiny_runs.make_data(folder / kind, images=2, name=name)
    content = json.loads(Path(entry["json"]).read_text())
    change(content)
    Path(entry["json"]).write_text(json.dumps(content))
    return {"KD.DATASETS": [entry], "DATASETS.TEST": [name]}


def _broken_test_set(folder: Path) -> dict[str, Any]:
    def spoil(content: Any) -> None:
        content["annotations"][1]["bbox"][2] = float("nan")

    return odd_test_set(folder, "broken", spoil)


#: What is wrong with a test set that is whole, how it becomes so, and what the message must say.
MISFITS: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "classes",
        lambda content: content["categories"][1].update(name="c"),
        r"class 1 is 'b' in training and 'c' in the test",
    ),
    ("empty", lambda content: content["annotations"].clear(), r"has no annotated object"),
    (
        "sizes",
        lambda content: content["images"][1].update(width=97),
        r"1\.png has 96 x 64 pixels .* annotated as 97 x 64",
    ),
]


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
