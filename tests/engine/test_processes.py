"""What each of several processes has of its own, in a checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from detectron2.utils import comm
from torch import nn

from kd_det.engine import processes
from kd_det.engine.trainer import DistillationTrainer


class Dense(nn.Module):
    """A detector with a loss normaliser, as Detectron2's dense ones have."""

    def __init__(self, normalizer: float) -> None:
        super().__init__()
        self.loss_normalizer = normalizer


def test_a_state_comes_back() -> None:
    model = Dense(7.5)
    state = processes.process_state(model)
    drawn = torch.rand(3)
    model.loss_normalizer = 1.0
    processes.set_process_state(model, state)
    assert torch.equal(torch.rand(3), drawn)
    assert model.loss_normalizer == 7.5


def test_states_are_gathered_where_a_checkpoint_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.comm, "gather", lambda state: [state, "of the other"])
    hook = processes.GatherProcessStates(Dense(2.0), period=3)
    gathered = []
    for iteration in range(8):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=8)
        hook.after_step()
        if hook.at(iteration):
            gathered.append(iteration)
    assert gathered == [2, 5, 7]
    assert hook.at(7)[1] == "of the other" and hook.at(5) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_takes_its_own(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {"KD.DATASETS": [tiny_data]})
    trainer = DistillationTrainer(tiny_runs.load_config(str(path)))
    trainer.iter = 0
    states, drawn = [], []
    for number in range(2):
        torch.manual_seed(number)
        states.append({**processes.process_state(trainer.model), "loss_normalizer": {}})
        drawn.append(torch.rand(3))
    kept = {**trainer.state_dict(), "processes": states}
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    trainer.load_state_dict(kept)
    assert torch.equal(torch.rand(3), drawn[rank])
    assert not torch.equal(drawn[0], drawn[1])


def test_one_process_keeps_no_list(tiny_data: dict[str, str], tmp_path: Path) -> None:
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {"KD.DATASETS": [tiny_data]})
    trainer = DistillationTrainer(tiny_runs.load_config(str(path)))
    trainer.iter = 0
    assert "processes" not in trainer.state_dict()
