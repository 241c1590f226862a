"""Every file of configs/ is a config whose keys exist and whose model, or student, can be built."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import kd_det.modeling  # noqa: F401
from kd_det.config import load_config, student_cfg
from kd_det.distillers import node_name
from kd_det.experiments.recipe import read_recipe

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
    # Building must not download, nor need the extra `backbones`.
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    build_model(student_cfg(cfg))
    teacher = cfg.KD.TEACHER.CONFIG_FILE
    assert not teacher or Path(teacher).is_file(), teacher


OURS = ("shapes", "shapes2", "aquarium", "quickstart", "methods", "detectors")
SMALL = [path for path in CONFIGS if path.parent.name in OURS]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_no_level_is_built_that_no_head_reads(path: Path) -> None:
    """Its parameters would get no gradient, and several processes would wait for them."""
    cfg = student_cfg(load_config(str(path)))
    cfg.MODEL.TIMM.WEIGHTS = ""
    model = build_model(cfg).train()
    instances = Instances(
        (128, 128),
        gt_boxes=Boxes(torch.tensor([[10.0, 10.0, 60.0, 60.0]])),
        gt_classes=torch.tensor([0]),
    )
    with EventStorage():
        losses = model([{"image": torch.rand(3, 128, 128) * 255, "instances": instances}] * 2)
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []


PUBLISHED = [
    path for path in CONFIGS if path.relative_to(FOLDER).parts[0] in ("coco", "crowdhuman")
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_published_experiments_give_their_weights(path: Path) -> None:
    """The weight that sets itself is kd_det's: what a paper gives stands in its config."""
    cfg = load_config(str(path))
    for name in cfg.KD.DISTILLERS:
        given = cfg.KD[node_name(name)].WEIGHT is not None
        assert given != ("weight for it is not known" in path.read_text())


@pytest.mark.parametrize(
    "path",
    [path for path in PUBLISHED if "coco" in path.parts],
    ids=lambda path: str(path.relative_to(FOLDER)),
)
def test_published_experiments_say_where_they_depart(path: Path) -> None:
    """In their header, or in that of the experiment they build on."""
    headers = ""
    file = path
    while "coco" in file.parts:
        text = file.read_text()
        headers += "".join(line for line in text.splitlines() if line.startswith("#"))
        base = yaml.safe_load(text).get("_BASE_")
        file = (file.parent / base).resolve() if base else FOLDER
    assert re.search(r"[Dd]epart(s|ed)?\b", headers)


RECIPES = [path for path in sorted(FOLDER.rglob("*.yaml")) if is_recipe(path)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_arms_of_recipes_are_configs(path: Path) -> None:
    recipe = read_recipe(str(path))
    for arm in recipe.arms:
        cfg = load_config(str(arm.config), [*recipe.overrides, *arm.overrides])
        teacher = cfg.KD.TEACHER.CONFIG_FILE
        assert not teacher or Path(teacher).is_file(), f"{arm.name}: {teacher}"
