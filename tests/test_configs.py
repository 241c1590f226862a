"""Every file of configs/ is a config whose keys exist and whose model, or student, can be built."""

from pathlib import Path

import pytest
import yaml
from detectron2.modeling import build_model

import kd_det.modeling  # noqa: F401
from kd_det.config import load_config, student_cfg

FOLDER = Path(__file__).parent.parent / "configs"


def is_recipe(path: Path) -> bool:
    return path.name.startswith("recipe") or "arms" in yaml.safe_load(path.read_text())


CONFIGS = [path for path in sorted(FOLDER.rglob("*.yaml")) if not is_recipe(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_config_builds(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "the first line says what the config shows"
    cfg = load_config(str(path))
    cfg.MODEL.DEVICE = "cpu"
    # Building must not download.
    cfg.MODEL.TIMM.PRETRAINED = False
    build_model(student_cfg(cfg))
    teacher = cfg.KD.TEACHER.CONFIG_FILE
    assert not teacher or Path(teacher).is_file(), teacher
