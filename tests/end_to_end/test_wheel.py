"""The built wheel, unpacked in a folder of its own: what is in it, and the README's commands."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from kd_det_cli import configs

ROOT = Path(__file__).parents[2]
SOURCE = ["kd_det", "kd_det_cli", "configs"]
FILES = ["train_net.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
COMMAND = [sys.executable, "-c", "import sys; from kd_det_cli import main; sys.exit(main())"]
TINY = ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "('shapes2_val',)"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCE:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=folder / "source",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(folder / done.stdout.split()[-1]).extractall(folder / "site")
    shutil.rmtree(folder / "source")
    return folder / "site"


def kd_det(
    installed: Path, folder: Path, *words: str, program: list[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    # Behind it what the tests run with, which may be where Detectron2 is.
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_it_brings_the_configs_of_the_repository(installed: Path, tmp_path: Path) -> None:
    done = kd_det(installed, tmp_path, "configs", "mine")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "mine" / "configs") == files_of(ROOT / "configs")
    assert (tmp_path / "mine" / "train_net.py").read_text() == (ROOT / "train_net.py").read_text()
    again = kd_det(installed, tmp_path, "configs", "mine")
    assert again.returncode == 0, again.stderr

    changed = tmp_path / "mine" / "configs" / "shapes2" / "ssim.yaml"
    changed.write_text("SEED: 1\n")
    (tmp_path / "mine" / "train_net.py").unlink()
    refused = kd_det(installed, tmp_path, "configs", "mine")
    assert refused.returncode == 2
    assert "1 files are there with another content (mine/configs/shapes2/ssim.yaml)" in (
        refused.stderr
    )
    assert changed.read_text() == "SEED: 1\n"
    assert not (tmp_path / "mine" / "train_net.py").exists()


def test_a_checkout_gives_its_own() -> None:
    assert configs.shipped_root() == ROOT


def test_a_missing_config_that_ships_is_offered(installed: Path, tmp_path: Path) -> None:
    done = kd_det(installed, tmp_path, "train", "--config-file", "configs/shapes2/ssim.yaml")
    assert done.returncode == 1
    assert "configs/shapes2/ssim.yaml does not exist" in done.stderr
    assert "kd_det ships configs/shapes2/ssim.yaml: `kd-det configs` copies" in done.stderr


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_another_folder(installed: Path, tmp_path: Path) -> None:
    assert kd_det(installed, tmp_path, "configs").returncode == 0
    config = ["--config-file", "configs/shapes2/ssim.yaml"]
    recipe = yaml.safe_load((tmp_path / "configs" / "quickstart" / "recipe.yaml").read_text())
    recipe["overrides"] = TINY
    (tmp_path / "configs" / "quickstart" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    models = ["--teacher", "kd_det://shapes2/fcos_r18", "--student", "configs/shapes2/student.yaml"]
    for words in (
        ["zoo"],
        ["train", *config, *TINY],
        ["train", *config, "--resume", "--num-gpus", "1", *TINY],
        ["train", *config, "--eval-only", *TINY],
        ["distill", *models, "--method", "ssim", "--out", "output/mine", *TINY],
        ["show", "pgd", "--config-file", "configs/shapes2/pgd.yaml", "--out", "pgd.png"],
        ["compare", "--recipe", "configs/quickstart/tiny.yaml", "--out", "out", "--arms", "l2"],
    ):
        done = kd_det(installed, tmp_path, *words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    program = [sys.executable, "train_net.py"]
    done = kd_det(installed, tmp_path, *config, *TINY, program=program)
    assert done.returncode == 0, done.stderr
    trained = "output/shapes2/ssim/model_final.pth"
    for file in (trained, "output/mine/model_final.pth", "pgd.png", "out/report.html"):
        assert (tmp_path / file).is_file(), file
