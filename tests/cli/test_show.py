"""The pictures of `kd-det show`, from tiny runs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
from detectron2.modeling import build_model
from PIL import Image
from tiny_runs import TinyTeacher

from kd_det.config import load_config, student_cfg
from kd_det_cli import main


@pytest.fixture
def config(
    tiny_data: dict[str, str], tiny_teacher: Callable[[str], TinyTeacher], tmp_path: Path
) -> Path:
    teacher = tiny_teacher("fcos")
    keys = {
        **tiny_runs.distil_keys("fcos", teacher),
        "MODEL.FPN.OUT_CHANNELS": load_config(str(teacher.config_file)).MODEL.FPN.OUT_CHANNELS,
        "KD.DISTILLERS": ["PGD", "SSIM"],
        "KD.DATASETS": [tiny_data],
        "DATASETS.TEST": [tiny_runs.DATA],
    }
    return tiny_runs.write_config(tmp_path / "student.yaml", "fcos", keys)


def show(*words: str) -> int:
    return main(["show", *words])


def save_student(config: Path, path: Path) -> str:
    model = build_model(student_cfg(load_config(str(config))))
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def test_importance_of_every_level_is_drawn(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "pgd.png"
    assert show("pgd", "--config-file", str(config), "--images", "2", "--out", str(out)) == 0
    assert len(Image.open(out).convert("L").getcolors()) > 50


def test_similarity_before_and_after_is_drawn(config: Path, tmp_path: Path) -> None:
    student = save_student(config, tmp_path / "a.pth")
    out = tmp_path / "ssim.png"
    words = ["ssim", "--config-file", str(config), "--before", student, "--after", student]
    assert show(*words, "--images", "1", "--out", str(out)) == 0
    assert len(Image.open(out).convert("L").getcolors()) > 50


def test_a_config_without_the_distiller_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pgd", "--config-file", str(config), "--out", str(tmp_path / "x.png")]
    assert show(*words, "KD.DISTILLERS", "['SSIM']") == 2
    said = capsys.readouterr().err
    assert re.search(r"KD.DISTILLERS is \['SSIM'\]; give the config .* PGD", said)
    assert show(*words, "KD.SSIM.WIEGHT", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith("kd-det show: the command line: no config key is called KD.SSIM.WIEGHT;")


def test_adapters_that_only_one_student_has_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = save_student(config, tmp_path / "a.pth")
    words = ["ssim", "--config-file", str(config), "--before", student, "--after", student]
    assert show(*words, "--out", str(tmp_path / "x.png"), "KD.SSIM.ADAPTER", "always") == 2
    assert "has adapters between student and teacher" in capsys.readouterr().err


def test_similarity_needs_two_checkpoints(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        show("ssim", "--config-file", str(config), "--before", "a.pth", "--out", "x.png")
    assert "required: --after" in capsys.readouterr().err
