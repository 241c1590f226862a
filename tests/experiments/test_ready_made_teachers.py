"""Arms that learn from a model that brings its weights itself, and is no detector."""

from pathlib import Path

import pytest

from kd_det.experiments.plan import make_plan
from kd_det.experiments.recipe import RecipeError, read_recipe

SHAPES2 = Path(__file__).parents[2] / "configs" / "shapes2"
VIT = "MODEL: {META_ARCHITECTURE: TimmFeatures, TIMM: {NAME: %s}}\n"
ARM = f"""_BASE_: {SHAPES2 / "ssim.yaml"}
KD: {{TEACHER: {{CONFIG_FILE: vit.yaml, WEIGHTS: auto}}}}
"""
RECIPE = f"""teacher: %s
baseline: none
arms:
  - {{name: none, config: {SHAPES2 / "student.yaml"}}}
  - {{name: vit, config: arm.yaml}}
"""


def write(folder: Path, *, teacher: str, model: str = "vit_tiny_patch16_224") -> Path:
    (folder / "vit.yaml").write_text(VIT % model)
    (folder / "arm.yaml").write_text(ARM)
    (folder / "recipe.yaml").write_text(RECIPE % teacher)
    return folder / "recipe.yaml"


def test_it_is_not_trained_and_another_makes_another_run(tmp_path: Path) -> None:
    runs = []
    for model in ("vit_tiny_patch16_224", "vit_small_patch16_224"):
        recipe = read_recipe(write(tmp_path, teacher=str(SHAPES2 / "teacher.yaml"), model=model))
        plan = make_plan(recipe, tmp_path / "out")
        assert [run.name for run in plan.teachers] == ["teacher"]
        run = plan.students["vit", 0]
        assert run.needs == () and "KD.TEACHER.WEIGHTS" not in run.opts
        runs.append(run.folder)
    assert runs[0] != runs[1]


def test_other_weights_of_its_own_make_another_run(tmp_path: Path) -> None:
    recipe = write(tmp_path, teacher=str(SHAPES2 / "teacher.yaml"))
    weights, runs = tmp_path / "w.pth", []
    (tmp_path / "vit.yaml").write_text(VIT % f"vit_tiny_patch16_224, WEIGHTS: {weights}")
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        runs.append(make_plan(read_recipe(recipe), tmp_path / "out").students["vit", 0].folder)
    assert runs[0] != runs[1]


def test_students_are_measured_by_a_detector(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"vit\.yaml is no detector.*arms may learn"):
        make_plan(read_recipe(write(tmp_path, teacher="vit.yaml")), tmp_path / "out")
