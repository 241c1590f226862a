"""What README and docs tell people to type works, in a folder of their own."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deployed
import pytest
import tiny_runs
import torch
import yaml
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher

from kd_det.config import load_config, student_cfg
from kd_det.engine.main import main
from kd_det.experiments.recipe import read_recipe
from kd_det_cli import COMMANDS, parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [block for name, block in found if name == language]


def test_getting_started(
    tiny_data: dict[str, str],
    tiny_teacher: Callable[[str], TinyTeacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The distilled run and what ships of it, word for word but for the teacher's path."""
    page = ROOT / "docs" / "getting_started.md"
    distilled, own_data, recipe = snippets(page, "yaml")
    ship, write, deploy, _ = snippets(page, "python")
    teacher = tiny_teacher("retinanet")
    keys = {"KD.DATASETS": [tiny_data], "SOLVER.MAX_ITER": 2}
    tiny_runs.write_config(tmp_path / "student.yaml", "retinanet", keys, r50=True)
    (tmp_path / "teacher.yaml").write_text(f"_BASE_: {teacher.config_file}\n")
    text = distilled.replace("/path/to/teacher.pth", str(teacher.weights))
    (tmp_path / "distilled.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)

    main(["--config-file", "distilled.yaml"])
    for code in (f"{ship}\n{write}", deployed.without_kd_det(deploy)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [arm.name for arm in read_recipe("recipe.yaml").arms] == ["none", "ssim"]
    (tmp_path / "data.yaml").write_text(own_data)
    assert list(load_config("data.yaml").DATASETS.TRAIN) == ["mine_train"]


def test_stock_detectron2_builds_an_fcos_that_was_distilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the page's code, which names nothing of kd_det; it predicts what kd_det's own does."""
    *_, plain = snippets(ROOT / "docs" / "getting_started.md", "python")
    assert "kd_det" not in plain
    cfg = load_config(
        str(ROOT / "configs" / "coco" / "crosskd" / "fcos_r101_r50_2x_ms.yaml"),
        ["MODEL.DEVICE", "cpu"],
    )
    own = build_model(student_cfg(cfg)).eval()
    (file,) = re.findall(r'load\("(.+)"\)', plain)
    (tmp_path / file).parent.mkdir(parents=True)
    torch.save({"model": own.state_dict()}, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(plain, names)
    stock = names["model"].eval()
    assert tiny_runs.equal_states(dict(own.state_dict()), dict(stock.state_dict()))
    image = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}
    models = [own, stock]
    for model in models:
        model.test_score_thresh = 0.0  # random weights are sure of nothing
    with torch.no_grad():
        found = [model([image])[0]["instances"].get_fields() for model in models]
    assert len(found[0]["scores"]) > 0
    assert torch.equal(found[0]["pred_boxes"].tensor, found[1]["pred_boxes"].tensor)
    assert torch.equal(found[0]["scores"], found[1]["scores"])


def test_recipes(tmp_path: Path) -> None:
    (recipe,) = snippets(ROOT / "docs" / "recipes.md", "yaml")
    for name in ("teacher", "student", "feature_lp", "ssim"):
        (tmp_path / f"{name}.yaml").write_text("SEED: 1\n")
    (tmp_path / "recipe.yaml").write_text(recipe)
    read = read_recipe(str(tmp_path / "recipe.yaml"))
    assert [arm.name for arm in read.arms] == ["none", "l2", "ssim", "longer"]


def test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys only: the distiller itself is registered by the page's own package, elsewhere."""
    _, twice = snippets(ROOT / "docs" / "plugins.md", "yaml")
    content = yaml.safe_load(twice)
    content["MODEL"] = {"META_ARCHITECTURE": "DistillationDetector"}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(content))
    assert load_config(str(tmp_path / "twice.yaml")).KD["FEATURE_LP:towers"].WEIGHT == 0.01


@pytest.mark.parametrize("page", ["models", "zoo"])
def test_yaml_has_known_keys(page: str, tmp_path: Path) -> None:
    for name in ("student", "teacher", "vit"):
        (tmp_path / f"{name}.yaml").write_text("SEED: 1\n")
    blocks = snippets(ROOT / "docs" / f"{page}.md", "yaml")
    for i, block in enumerate(blocks):
        content = {"MODEL": {"META_ARCHITECTURE": "DistillationDetector"}, **yaml.safe_load(block)}
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(content))
        load_config(str(tmp_path / f"{i}.yaml"))  # refuses keys that do not exist
    assert blocks


def inline(page: Path) -> list[str]:
    """Commands in running text, without what stands for something of the reader's."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"`((?:uv run |kd-det )[^`]+)`", text)
    lines = [" ".join(line.split()).removeprefix("uv run ") for line in found]
    return [f"uv run {line}" for line in lines]


COMMAND_LINES = [
    (page.name, line)
    for page in PAGES
    for block in (*snippets(page, ""), *inline(page))
    for line in block.replace("\\\n", " ").splitlines()
    if "uv run" in line
]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = [word for word in words[words.index("run") + 1 :] if word != "--project"]
    words = [word.removeprefix("../kd_det/") for word in words if word != "../kd_det"]
    assert words[0] in ("kd-det", "train_net.py", "pytest", "torchrun"), line
    if words[0] == "kd-det":
        assert words[1] in COMMANDS, line
        if "--" in line and "[" not in line:
            parser().parse_args(words[1:])  # exits where an argument is unknown or missing
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), line


def test_commands_are_found() -> None:
    assert len(COMMAND_LINES) > 5
