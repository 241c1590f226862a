"""A model that has diverged is not saved, and what was saved before stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from torch import nn

from kd_det.checkpoint import KDCheckpointer
from kd_det.checkpoint.finite import refuse_non_finite
from kd_det.engine.trainer import DistillationTrainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_names_what_is_broken(value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(dtype)
    refuse_non_finite(model, "a.pth")
    with torch.no_grad():
        model[0].weight[1, 1] = value
    message = (
        r"^a.pth is not saved, since 1 of the model's 7 .* update: 0.weight; the .* are kept.*--res"
    )
    with pytest.raises(FloatingPointError, match=message):
        refuse_non_finite(model, "a.pth")


def test_buffers_may_be_infinite_but_not_nan() -> None:
    model = nn.BatchNorm1d(3)
    model.running_var[0] = float("inf")
    refuse_non_finite(model, "a.pth")
    model.running_var[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"1 of the model's 5 tensors .*: running_var;"):
        refuse_non_finite(model, "a.pth")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)])
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"18 of the model's 18 tensors .*3.bias, \.\.\.; "
    ):
        refuse_non_finite(model, "a.pth")


def test_the_last_good_checkpoint_stays_the_last(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    checkpointer = KDCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    model.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"model_final.pth is not saved"):
        checkpointer.save("model_final")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("part", ["student", "active"])
def test_a_run_whose_last_update_diverges_fails(
    tiny_student: Callable[..., CfgNode],
    tiny_teacher: Callable[[str], tiny_runs.TinyTeacher],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    """Its losses are finite in all steps: only the last update is not."""
    cfg = tiny_student("fcos", tiny_teacher("fcos"), {"SOLVER.CHECKPOINT_PERIOD": 2})
    trainer = DistillationTrainer(cfg)
    take_step: Any = trainer._trainer.run_step

    def run_step() -> None:
        take_step()
        if trainer.iter == 2:
            parameter = next(getattr(trainer.model, part).parameters())
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(trainer._trainer, "run_step", run_step)
    with pytest.raises(
        FloatingPointError, match=rf"model_final.pth is not saved.*update: {part}\."
    ):
        trainer.train()
    files = {path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth")}
    assert files == {"model_0000001.pth"}
