"""Keys beside their class: each registered detector brings its own; names a host has taken."""

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.registry import Registry

import kd_det
from kd_det import modeling
from kd_det.modeling.dense.atss import ATSS, AtssOptions
from kd_det.modeling.options import add_keys, defaults_of, read_options
from kd_det.modeling.registering import register_in


@dataclass(frozen=True, kw_only=True)
class WiderOptions(AtssOptions):
    extra: int = 5


class Wider(ATSS):
    """A plugin's detector with one more key in its parent's node."""

    options_type = WiderOptions


class Mine:
    """A plugin's detector of its own kind."""

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        cfg.MODEL.MINE = CfgNode({"DEPTH": 3})


def test_registered_detectors_bring_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("Wider", Wider), ("Mine", Mine)):
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, name, cls)
    cfg = get_cfg()
    modeling.add_config(cfg)
    assert cfg.MODEL.MINE.DEPTH == 3
    assert cfg.MODEL.ATSS.EXTRA == 5 and cfg.MODEL.ATSS.TOPK == 9
    assert "EXTRA" not in cfg.MODEL.GFL
    assert {"FCOS", "GFL", "ALIGNED", "TIMM"} <= set(cfg.MODEL)
    assert cfg.MODEL.FPN.TOP_BLOCK == "p6p7_c5" and cfg.MODEL.FPN.OUT_CHANNELS == 256


def test_keys_that_exist_keep_their_values() -> None:
    cfg = get_cfg()
    cfg.MODEL.FCOS = CfgNode({"NUM_CLASSES": 7, "HOSTS_OWN": True})
    modeling.add_config(cfg)
    cfg.MODEL.ALIGNED.FACTOR = 4
    modeling.add_config(cfg)
    assert cfg.MODEL.FCOS.NUM_CLASSES == 7 and cfg.MODEL.FCOS.HOSTS_OWN
    assert cfg.MODEL.FCOS.NUM_CONVS == 4 and cfg.MODEL.ALIGNED.FACTOR == 4


def test_options_are_their_node() -> None:
    cfg = CfgNode()
    add_keys(cfg, "ATSS", defaults_of(AtssOptions))
    assert read_options(AtssOptions, cfg.ATSS) == AtssOptions()
    cfg.ATSS.merge_from_list(["TOPK", 3, "IN_FEATURES", ["p4"]])
    changed = read_options(AtssOptions, cfg.ATSS)
    assert (changed.topk, changed.in_features) == (3, ["p4"])
    assert AtssOptions().in_features == ["p3", "p4", "p5", "p6", "p7"]


def test_a_taken_name_stays_with_the_host(caplog: pytest.LogCaptureFixture) -> None:
    def make(module: str) -> Any:
        return type("ATSS", (), {"__module__": module})

    registry = Registry("TEST")
    theirs, ours = make("host.detectors"), make("kd_det.modeling.dense.atss")
    registry.register(theirs)
    with caplog.at_level(logging.WARNING):
        assert register_in(registry)(ours) is ours
    assert registry.get("ATSS") is theirs
    assert "ATSS was registered by host.detectors" in caplog.text
    assert "subclass of kd_det.modeling.dense.atss.ATSS" in caplog.text
    # The same module twice is a mistake of ours, as with every registry.
    with pytest.raises(AssertionError, match="already registered"):
        register_in(registry)(make("host.detectors"))


_HOST = """
import importlib.util, logging, sys
spec = importlib.util.spec_from_file_location("repairs", sys.argv[1] + "/compat.py")
repairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(repairs)
repairs.install()
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

@META_ARCH_REGISTRY.register()
class ATSS:
    pass

@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape):
    pass

from detectron2.config import get_cfg
import kd_det
from kd_det.config import add_kd_config
from kd_det.modeling.dense import atss

assert META_ARCH_REGISTRY.get("ATSS") is ATSS is not atss.ATSS
assert BACKBONE_REGISTRY.get("build_timm_backbone") is build_timm_backbone
cfg = get_cfg()
add_kd_config(cfg)
assert "ATSS" not in cfg.MODEL and "GFL" in cfg.MODEL

@META_ARCH_REGISTRY.register()
class KdAtss(atss.ATSS):
    pass

cfg = get_cfg()
add_kd_config(cfg)
assert cfg.MODEL.ATSS.TOPK == 9
"""


def test_a_host_with_an_atss_of_its_own_can_import_kd_det() -> None:
    """It keeps its detector, is told so, and gets kd_det's by a subclass under another name."""
    package = Path(kd_det.__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", _HOST, str(package)]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ATSS was registered by __main__ before kd_det was imported" in done.stderr
    assert "build_timm_backbone was registered by __main__" in done.stderr
