"""SOLVER.BOTTOM_UP_LR_FACTOR: who learns at which rate."""

from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kd_det.config import student_cfg
from kd_det.engine.trainer import DistillationTrainer

ADAMW = {
    "MODEL.FCOS.NORM": "GN",
    "SOLVER.OPTIMIZER": "AdamW",
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
}


def make(tmp_path: Any, keys: dict[str, Any]) -> tuple[CfgNode, nn.Module]:
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {**ADAMW, **keys})
    cfg = tiny_runs.load_config(str(path))
    return cfg, build_model(student_cfg(cfg))


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_the_net_below_the_pyramid_learns_slower(tmp_path: Any) -> None:
    cfg, model = make(tmp_path, {"SOLVER.BOTTOM_UP_LR_FACTOR": 0.25})
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    found = rates(optimizer, model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in found.items():
        assert rate == (0.0025 if name.startswith("backbone.bottom_up.") else 0.01), name
    # Norms keep the weight decay of their own.
    decays = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {(lr, decay) for lr in (0.0025, 0.01) for decay in (0.0, 0.0001)}


def test_one_changes_nothing(tmp_path: Any) -> None:
    """Also not the groups, which old checkpoints of the optimizer are read into."""
    cfg, model = make(tmp_path, {})
    groups = DistillationTrainer.build_optimizer(cfg, model).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.01, 0.0001),
        (0.01, 0.0),
    ]


def test_biases_have_a_rate_and_a_decay_of_their_own(tmp_path: Any) -> None:
    keys = {"SOLVER.BIAS_LR_FACTOR": 2.0, "SOLVER.WEIGHT_DECAY_BIAS": 0.0}
    cfg, model = make(tmp_path, keys)
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    bias, weight = (groups[id(p)] for p in (model.head.cls_score.bias, model.head.cls_score.weight))
    assert (bias["lr"], bias["weight_decay"]) == (0.02, 0.0)
    assert (weight["lr"], weight["weight_decay"]) == (0.01, 0.0001)


def test_where_it_cannot_act_it_is_refused(tmp_path: Any) -> None:
    cfg, model = make(tmp_path, {"SOLVER.BOTTOM_UP_LR_FACTOR": 0.25, "SOLVER.OPTIMIZER": "SGD"})
    with pytest.raises(ValueError, match=r"BOTTOM_UP_LR_FACTOR is 0\.25, which SGD does not know"):
        DistillationTrainer.build_optimizer(cfg, model)
    cfg.SOLVER.OPTIMIZER = "AdamW"
    with pytest.raises(ValueError, match="Linear has no module called bottom_up"):
        DistillationTrainer.build_optimizer(cfg, nn.Linear(2, 2))
