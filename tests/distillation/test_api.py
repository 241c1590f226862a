"""Distillation from Python: the same model as from a config, and the page's lines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from torch import nn

import kd_det
from kd_det import Teacher, Weighted, distill, distillers, load_teacher
from kd_det.config import student_cfg
from kd_det.distillers import CWD, DISTILLER_REGISTRY, PKD, FeatureLp

PAGE = Path(__file__).parents[2] / "docs" / "lazyconfig.md"
LINES = re.findall(r"^(L\(Weighted\).*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)


@pytest.fixture
def models(
    tiny_student: Callable[..., CfgNode], tiny_teacher: Callable[[str], TinyTeacher]
) -> tuple[CfgNode, TinyTeacher]:
    teacher = tiny_teacher("fcos")
    keys = {
        "KD.DISTILLERS": ["FeatureLp", "PKD:all"],
        "KD.FEATURE_LP.WEIGHT": 0.5,
        "KD.FEATURE_LP.SCHEDULE.WARMUP_ITERS": 4,
        "KD.PKD:all.LEVELS": 0,
        "KD.PKD:all.SHARE": 0.25,
        "SOLVER.MAX_ITER": 10,
    }
    return tiny_student("fcos", teacher, keys), teacher


def test_it_is_the_model_of_the_config(
    models: tuple[CfgNode, TinyTeacher], tiny_records: list[dict[str, Any]]
) -> None:
    cfg, teacher = models
    batch = tiny_runs.batch_of(cfg, tiny_records)
    torch.manual_seed(1)
    wanted = build_model(cfg)
    torch.manual_seed(1)
    found = distill(
        build_model(student_cfg(cfg)),
        load_teacher(str(teacher.config_file), str(teacher.weights)),
        [
            Weighted(FeatureLp(), 0.5, warmup_iters=4),
            Weighted(PKD(levels=0), share=0.25, label="all"),
        ],
        max_iter=10,
        grad_share_period=0,
    )
    assert tiny_runs.equal_states(found.state_dict(), wanted.state_dict())
    for iteration in (0, 1, 5):
        ours, theirs = (tiny_runs.losses_at(m, batch, iteration)[0] for m in (found, wanted))
        assert "loss_kd_pkd:all" in ours
        assert tiny_runs.equal_states(ours, theirs)
    assert found.teacher.identity == wanted.teacher.identity


def test_another_pixel_format(models: tuple[CfgNode, TinyTeacher]) -> None:
    _, teacher = models
    files = str(teacher.config_file), str(teacher.weights)
    assert not load_teacher(*files).flip_channels
    assert load_teacher(*files, input_format="RGB").flip_channels
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'YUV-BT\.601'"):
        load_teacher(*files, input_format="YUV-BT.601")


def test_any_module_can_teach(models: tuple[CfgNode, TinyTeacher]) -> None:
    cfg, _ = models
    student = build_model(student_cfg(cfg))
    model = distill(student, Teacher(build_model(student_cfg(cfg))), [PKD()], max_iter=100)
    assert list(model.active) == ["PKD"]


class TestRefusals:
    def test_two_of_one_name(self) -> None:
        with pytest.raises(ValueError, match=r"Two distillers are called 'PKD'.*label"):
            distill(nn.Identity(), None, [PKD(), Weighted(PKD(), 1.0)], max_iter=10)

    @pytest.mark.parametrize("one", [PKD, lambda: Weighted(CWD(), 1.0, decay="cosine")])
    def test_no_length_where_it_counts(self, one: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=r"depends on the length of the run; give max_iter"):
            distill(nn.Identity(), None, [one()])

    def test_an_unknown_schedule(self) -> None:
        with pytest.raises(KeyError, match=r"PKD: no schedule has 'warm_up_iters'.*warmup_iters"):
            Weighted(PKD(), warm_up_iters=3)

    def test_distillers_without_a_teacher(self) -> None:
        with pytest.raises(ValueError, match=r"need a teacher, and none was given"):
            distill(nn.Identity(), None, [Weighted(PKD(), 1.0)])


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_page_composes(line: str) -> None:
    names = {"L": LazyCall, "Weighted": Weighted, **vars(distillers)}
    assert isinstance(instantiate(eval(line, names)), Weighted)


def test_the_page_has_every_method() -> None:
    shown = {re.search(r"distiller=L\((\w+)\)", line)[1] for line in LINES}  # type: ignore[index]
    ours = {key for key, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_det.")}
    assert shown == ours


def test_what_is_exported() -> None:
    assert all(hasattr(kd_det, name) for name in kd_det.__all__)
