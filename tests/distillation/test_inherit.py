"""Inheriting tensors from the teacher."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from torch import nn

from kd_det.distillation.inherit import inherit


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.ModuleDict(
        {
            "body": nn.Conv2d(3, width, 1),
            "head": nn.ModuleDict({"cls": nn.Linear(4, 2), "box": nn.Linear(4, 4)}),
            "header": nn.BatchNorm1d(4),
        }
    )


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head.cls.*"], {"head.cls.weight", "head.cls.bias"}),
        (["head"], {"head.cls.weight", "head.cls.bias", "head.box.weight", "head.box.bias"}),
        (["*.bias", "head.cls"], {"head.cls.weight", "head.cls.bias", "head.box.bias"}),
    ],
)
def test_copies_what_the_patterns_name_and_nothing_else(
    patterns: list[str], expected: set[str]
) -> None:
    student, teacher = net(5), net(6)
    with torch.no_grad():
        student["header"].bias.fill_(7.0)  # type: ignore[operator,union-attr]
        teacher["header"].bias.fill_(7.0)  # type: ignore[operator,union-attr]
    before = {k: v.clone() for k, v in student.state_dict().items()}
    source = {k: v.clone() for k, v in teacher.state_dict().items()}
    copied = inherit(student, teacher, patterns)

    assert changed(before, student) == expected
    assert len(copied) == len(set(copied))
    assert set(copied) - {"header.bias"} == expected
    assert all(torch.equal(student.state_dict()[k], source[k]) for k in copied)
    assert not changed(source, teacher)
    # Copies, not the same storage: training the student must not move the teacher.
    assert not {p.data_ptr() for p in student.parameters()} & {
        p.data_ptr() for p in teacher.parameters()
    }


def test_buffers_are_inherited_too() -> None:
    student, teacher = net(5), net(5)
    teacher["header"].running_mean.fill_(3.0)  # type: ignore[operator,union-attr]
    inherit(student, teacher, ["header"])
    assert torch.equal(student.state_dict()["header.running_mean"], torch.full((4,), 3.0))


def test_reports_every_tensor_the_pattern_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        copied = inherit(net(5), net(6), ["*"])
    assert "body.weight" not in copied
    assert "(5, 3, 1, 1) here, (6, 3, 1, 1) in the teacher" in caplog.text
    total = len(net(5).state_dict())
    assert f"Inherited {total - 2} of {total} tensors" in caplog.text
    assert all(key in caplog.text for key in net(5).state_dict())


def test_a_pattern_of_nothing_names_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"KD.INHERIT: the pattern 'heat.cls.weight' names no"
    ) as e:
        inherit(net(5), net(5), ["heat.cls.weight"])
    assert "head.cls.weight" in str(e.value)


def test_a_misspelled_module_is_told_the_module() -> None:
    with pytest.raises(ValueError, match=r"names are head\.\*"):
        inherit(net(5), net(5), ["haed.*"])


def test_a_pattern_of_which_nothing_fits_says_why() -> None:
    with pytest.raises(ValueError, match=r"no tensor of 'body' could be copied") as error:
        inherit(net(5), net(6), ["head", "body"])
    assert "kept: (5,) here, (6,) in the teacher" in str(error.value)


def test_runs_inherit_at_a_fresh_start_only(
    tiny_student: Callable[..., CfgNode], tiny_teacher: Callable[[str], TinyTeacher]
) -> None:
    """A head of the teacher's width; FPN and head channels are 48 in the tiny teachers."""
    keys: dict[str, Any] = {
        "KD.DISTILLERS": [],
        "KD.INHERIT": ["head"],
        "MODEL.FPN.OUT_CHANNELS": 48,
        "SOLVER.BASE_LR": 0.01,
    }
    cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
    source = torch.load(tiny_teacher("fcos").weights)["model"]
    heads = [k for k in source if k.startswith("head.")]

    trainer = tiny_runs.DistillationTrainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.student.state_dict().items()}
    trainer.resume_or_load(resume=True)  # nothing to resume from
    state = trainer.model.student.state_dict()
    assert all(torch.equal(state[k], source[k]) for k in heads)
    assert all(torch.equal(state[k], before[k]) for k in state if k not in heads)
    trainer.train()
    trained = {k: v.clone() for k, v in trainer.model.student.state_dict().items()}

    resumed = tiny_runs.DistillationTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert tiny_runs.equal_states(dict(resumed.model.student.state_dict()), trained)
    assert not torch.equal(trained["head.cls_score.weight"], source["head.cls_score.weight"])


def test_inheriting_needs_a_teacher(tiny_student: Callable[..., CfgNode]) -> None:
    with pytest.raises(ValueError, match=r"KD.TEACHER.CONFIG_FILE is empty.*name the yaml"):
        build_model(tiny_student("fcos", None, {"KD.INHERIT": ["head"]}))
