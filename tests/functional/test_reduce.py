"""Means over the processes of a job."""

from pathlib import Path

import gloo_worker
import torch
from torch import multiprocessing

from kd_det.functional.reduce import mean_number_over_processes, mean_over_processes


def test_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(gloo_worker.work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        mean, given, number = torch.load(tmp_path / f"{rank}.pth")
        assert mean.tolist() == [0.5, 3.0]
        assert given.tolist() == [rank, 3]  # not written to
        assert number == 0.5


def test_one_process_keeps_every_bit() -> None:
    for value in (torch.tensor([3]), torch.tensor(0.1, dtype=torch.float64), torch.ones(2).half()):
        out = mean_over_processes(value)
        assert out.dtype == value.dtype
        assert torch.equal(out, value)
    assert mean_number_over_processes(3, torch.device("cpu")) == 3
