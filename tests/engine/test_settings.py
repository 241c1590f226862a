"""Every setting of Detectron2's own configs trains, as student and as teacher, and is evaluated."""

import importlib.util
import json
import math
import uuid
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import zoo_data
import zoo_settings
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from zoo_settings import SETTINGS, TEACHERS, Setting

from kd_det.config import load_config, student_cfg
from kd_det.engine.main import main

# One of each kind of data and of model; the others are `slow`.
QUICK = ("faster_rcnn_DC5", "rpn_FPN", "panoptic_FPN", "semantic_FPN", "voc_faster_rcnn_C4")
EVALUATED_BY_OTHERS = ["panoptic_FPN", *(n for n in SETTINGS if n.startswith(("lvis", "city")))]
WALK = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SETTINGS]


def missing(setting: Setting) -> list[str]:
    return [name for name in setting.modules if importlib.util.find_spec(name) is None]


def make_teacher(folder: Path, keys: dict[str, Any]) -> tuple[Path, Path]:
    config = zoo_settings.write(folder / "teacher.yaml", keys)
    weights = tiny_runs.save_random_weights(load_config(str(config)), folder / "teacher.pth")
    return config, weights


def run(folder: Path, keys: dict[str, Any], name: str, test: list[str]) -> dict[str, Any]:
    """Distil a student of these keys by a teacher of the same; return what is logged last."""
    student = zoo_settings.distilled(keys, *make_teacher(folder, keys))
    data = {"DATASETS.TRAIN": [name], "DATASETS.TEST": test}
    main(["--config-file", str(zoo_settings.write(folder / "run.yaml", student, **data))])
    lines = (folder / "run" / "metrics.json").read_text().splitlines()
    return {k: v for line in lines for k, v in json.loads(line).items()}


@pytest.mark.filterwarnings("default")  # what other people's packages warn of is theirs
@pytest.mark.parametrize("name", WALK)
def test_trains_and_is_evaluated(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    lacking = missing(setting)
    if lacking and setting.loads:
        pytest.skip(f"{', '.join(lacking)} not installed, which reads the data")
    data = setting.data(tmp_path / f"{name}_{uuid.uuid4().hex}")
    logged = run(tmp_path, setting.keys, data, [] if lacking else [data])

    assert logged["loss_kd_feature_lp"] > 0
    assert all(math.isfinite(v) for k, v in logged.items() if "loss" in k)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["metrics"]) == (set() if lacking else set(setting.tasks))
    model = build_model(student_cfg(load_config(str(tmp_path / "run.yaml"))))
    path = str(tmp_path / "run" / "model_final.pth")
    DetectionCheckpointer(model).load(path)
    model.load_state_dict(torch.load(path, weights_only=True)["model"], strict=True)


@pytest.mark.filterwarnings("default")
def test_evaluates_alone(tmp_path: Path) -> None:
    """Data without instances: no step, and no evaluation, asks for them."""
    setting = SETTINGS["semantic_FPN"]
    data = setting.data(tmp_path / f"alone_{uuid.uuid4().hex}")
    run(tmp_path, setting.keys, data, [data])
    first = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    again = main(["--config-file", str(tmp_path / "run.yaml"), "--eval-only"])
    assert again["sem_seg"]["mIoU"] == pytest.approx(first["sem_seg"]["mIoU"])
    assert 0 <= again["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize("name", EVALUATED_BY_OTHERS)
def test_a_missing_package_is_named_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, setting = importlib.util.find_spec, SETTINGS[name]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in setting.modules else find(n, *a)
    )
    kind = {
        zoo_data.panoptic: "coco_panoptic_seg",
        zoo_data.lvis: "lvis",
        zoo_data.cityscapes: "cityscapes_instance",
        zoo_data.cityscapes_semantic: "cityscapes_sem_seg",
    }[setting.data]
    data = zoo_data.coco(tmp_path / f"named_{uuid.uuid4().hex}")
    test = f"{data}_test"
    zoo_data.register(test, lambda: [], kind)
    keys = zoo_settings.distilled(setting.keys, *make_teacher(tmp_path, setting.keys))
    keys |= {"DATASETS.TRAIN": [data], "DATASETS.TEST": [test]}
    with pytest.raises(ImportError, match=rf"{kind}.*needs the package {setting.modules[0]}.*pip"):
        main(["--config-file", str(zoo_settings.write(tmp_path / "run.yaml", keys))])
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [n for n in TEACHERS if n != "faster_rcnn_FPN"])
def test_teaches_another(name: str, tmp_path: Path) -> None:
    """Its pyramid has a level in common with that of a Faster R-CNN."""
    data = zoo_data.coco(tmp_path / f"other_{uuid.uuid4().hex}")
    teacher = make_teacher(tmp_path, TEACHERS[name].keys)
    keys = zoo_settings.distilled(SETTINGS["faster_rcnn_FPN"].keys, *teacher)
    keys |= {"DATASETS.TRAIN": [data]}
    cfg = load_config(str(zoo_settings.write(tmp_path / "run.yaml", keys)))
    _, recorder = tiny_runs.train(cfg)
    assert all(step["loss_kd_feature_lp"] > 0 for step in recorder.steps)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_precomputed_proposals_are_refused(role: str, tmp_path: Path) -> None:
    data = zoo_data.coco(tmp_path / f"proposals_{uuid.uuid4().hex}")
    plain = SETTINGS["faster_rcnn_FPN"].keys
    given = {**plain, "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}
    teacher = make_teacher(tmp_path, given if role == "teacher" else plain)
    keys = zoo_settings.distilled(given if role == "student" else plain, *teacher)
    cfg = load_config(
        str(zoo_settings.write(tmp_path / "run.yaml", keys | {"DATASETS.TRAIN": [data]}))
    )
    with pytest.raises(ValueError, match=rf"The {role}.*precomputed.*RPN"):
        tiny_runs.train(cfg)
