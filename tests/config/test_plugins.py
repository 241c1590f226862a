"""Other people's code: imported before keys are checked, in every process; labelled twins."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import TinyTeacher

from kd_det.config import load_config
from kd_det.config.plugins import import_plugins
from kd_det.distillers import FeatureLp, build_distiller

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"
MakeTeacher = Callable[[str], TinyTeacher]


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def write(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


class TestKeys:
    def test_a_project_function_adds_its_keys(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "def add_project_config(cfg):\n    cfg.MODEL.PROJECT_POINTS = 28\n"
        name = module(tmp_path, monkeypatch, "project_a", text)
        content = {"KD": {"PLUGINS": [f"{name}:add_project_config"]}}
        assert load_config(write(tmp_path, content)).MODEL.PROJECT_POINTS == 28
        content["MODEL"] = {"PROJECT_POINTS": 14}
        assert load_config(write(tmp_path, content)).MODEL.PROJECT_POINTS == 14

    def test_an_override_opens_the_door_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "def add_project_config(cfg):\n    cfg.MODEL.PROJECT_POINTS = 28\n"
        name = module(tmp_path, monkeypatch, "project_b", text)
        words = ["KD.PLUGINS", f"['{name}:add_project_config']", "MODEL.PROJECT_POINTS", "7"]
        assert load_config(write(tmp_path, {"SEED": 1}), words).MODEL.PROJECT_POINTS == 7

    def test_without_the_plugin_its_keys_are_unknown(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError, match=r"no config key is called MODEL.PROJECT_POINTS"):
            load_config(write(tmp_path, {"MODEL": {"PROJECT_POINTS": 14}}))


class TestRefusals:
    def test_an_unknown_module(self) -> None:
        with pytest.raises(ImportError, match=r"'no_such.module' cannot be .* add the folder that"):
            import_plugins(["no_such.module"])

    def test_a_module_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name = module(tmp_path, monkeypatch, "broken_plugin", "1 / 0")
        with pytest.raises(
            ImportError, match=r"ZeroDivisionError.*importing it failed .*plugin.py, line 1"
        ):
            import_plugins([name])

    def test_a_module_that_lacks_a_module_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = module(tmp_path, monkeypatch, "needy_plugin", "import no_such_library")
        with pytest.raises(ImportError, match=r"no_such_library.*importing it failed"):
            import_plugins([name])

    def test_a_function_that_adds_no_keys(self) -> None:
        with pytest.raises(ValueError, match="names the function 'system'; expected one that adds"):
            import_plugins(["os:system"])

    def test_an_absent_function(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name = module(tmp_path, monkeypatch, "empty_plugin", "")
        with pytest.raises(ImportError, match="has no function 'add_my_config'"):
            import_plugins([f"{name}:add_my_config"])

    def test_no_name(self) -> None:
        with pytest.raises(ValueError, match=r"KD.PLUGINS holds 3; expected names"):
            import_plugins([3])  # type: ignore[list-item]


class TestLabels:
    def test_each_has_keys_of_its_own(self, tmp_path: Path) -> None:
        kd = {
            "DISTILLERS": ["FeatureLp", "FeatureLp:head"],
            "FEATURE_LP": {"P": 1},
            "FEATURE_LP:head": {"STUDENT_CAPTURE": "head.cls_subnet", "WEIGHT": 3},
        }
        content = {"MODEL": {"META_ARCHITECTURE": "DistillationDetector"}, "KD": kd}
        cfg = load_config(write(tmp_path, content), ["KD.FEATURE_LP:head.MASK_PADDING", "True"])
        plain, head = (build_distiller(name, cfg) for name in cfg.KD.DISTILLERS)
        assert isinstance(plain, FeatureLp) and isinstance(head, FeatureLp)
        assert (plain.p, head.p) == (1, 2)
        assert (plain.spec.student, head.spec.student) == ("backbone", "head.cls_subnet")
        assert (plain.mask_padding, head.mask_padding) == (False, True)
        assert cfg.KD["FEATURE_LP:head"].WEIGHT == 3.0

    def test_a_label_that_nothing_uses_is_an_unknown_key(self, tmp_path: Path) -> None:
        content = {"KD": {"FEATURE_LP:haed": {"P": 1}}}
        with pytest.raises(KeyError, match=r"no config key is called KD.FEATURE_LP:haed.P"):
            load_config(write(tmp_path, content))

    def test_the_same_name_twice_is_refused(self, tmp_path: Path) -> None:
        content = {
            "MODEL": {"META_ARCHITECTURE": "DistillationDetector"},
            "KD": {"DISTILLERS": ["SSIM", "SSIM"]},
        }
        with pytest.raises(ValueError, match="names 'SSIM' twice; give the second one a label"):
            load_config(write(tmp_path, content))

    def test_both_train_and_resume(
        self,
        tiny_student: Callable[..., Any],
        tiny_teacher: MakeTeacher,
    ) -> None:
        keys = {
            "KD.DISTILLERS": ["FeatureLp", "FeatureLp:towers"],
            "KD.FEATURE_LP:towers.STUDENT_CAPTURE": "head.cls_subnet",
            "KD.FEATURE_LP:towers.TEACHER_CAPTURE": "head.cls_subnet",
            "KD.FEATURE_LP:towers.WEIGHT": 0.01,
            "SOLVER.MAX_ITER": 4,
        }
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        trainer, recorder = tiny_runs.train(cfg, until=1)
        trainer.checkpointer.save("model_0000000", iteration=0)
        losses = {key for key in recorder.steps[0] if "loss_kd" in key}
        assert losses == {"loss_kd_feature_lp", "loss_kd_feature_lp:towers"}
        saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_0000000.pth")["kd"]["adapters"]
        names = {key.split(".")[0] for key in saved}
        assert names == {"FeatureLp-features", "FeatureLp:towers-features"}
        assert not tiny_runs.equal_states(
            saved["FeatureLp-features.0.weight"], saved["FeatureLp:towers-features.0.weight"]
        )
        resumed, _ = tiny_runs.train(cfg, resume=True)
        assert (resumed.start_iter, resumed.iter) == (2, 4)


class TestPackage:
    """The package in tests/plugin, which knows nothing of these tests."""

    @pytest.fixture
    def config(self, tiny_data: dict[str, str], tiny_teacher: MakeTeacher, tmp_path: Path) -> Path:
        keys = {
            **tiny_runs.distil_keys("fcos", tiny_teacher("fcos")),
            "KD.PLUGINS": ["correlation_kd"],
            "KD.DISTILLERS": ["Correlation"],
            "KD.CORRELATION": {"POWER": 3, "WEIGHT": 0.5},
            "KD.DATASETS": [tiny_data],
        }
        return tiny_runs.write_config(tmp_path / "plugin.yaml", "fcos", keys)

    def test_by_path_in_two_processes(
        self, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", f"{PLUGIN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        tiny_runs.torchrun(config, "OUTPUT_DIR", str(tmp_path / "two"))
        metrics = (tmp_path / "two" / "metrics.json").read_text()
        assert '"loss_kd_correlation"' in metrics
        assert (tmp_path / "two" / "model_final.pth").exists()

    def test_its_keys_are_checked(self, config: Path) -> None:
        script = (
            "import sys; from kd_det.config import load_config\n"
            f"load_config({str(config)!r}, ['KD.CORRELATION.POWR', 1])"
        )
        path = f"{PLUGIN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "the nearest valid names are KD.CORRELATION.POWER" in done.stderr

    def test_the_page_shows_this_package(self) -> None:
        page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
        file = PLUGIN / "correlation_kd" / "__init__.py"
        assert f"```python\n{file.read_text(encoding='utf-8')}```" in page
