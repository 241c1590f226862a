"""Divisors over objects are means over processes: an object weighs the same wherever it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from uneven_processes import DETECTORS, Result, all_results, work

from kd_det.functional import reduce

NAMES = ["pgd", *DETECTORS]
Results = dict[str, Result]


def in_turn(ranks: int, run: Callable[[int], Results]) -> list[Results]:
    """
    Run what processes would run, one after the other.

    In a first round each says what it exchanges; in the second each is given the sums.
    """
    said: list[list[Tensor]] = []

    def listen(value: Tensor) -> None:
        said[-1].append(value.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "_several", lambda: True)
        patch.setattr(reduce.distributed, "get_world_size", lambda: ranks)
        patch.setattr(reduce.distributed, "all_reduce", listen)
        for rank in range(ranks):
            said.append([])
            run(rank)
        sums = [sum(values) for values in zip(*said, strict=True)]
        out = []
        for rank in range(ranks):
            queue = iter(sums)
            patch.setattr(reduce.distributed, "all_reduce", lambda v, q=queue: v.copy_(next(q)))
            out.append(run(rank))
        return out


@pytest.fixture(scope="module")
def one() -> Results:
    """What one process computes of both images."""
    return all_results([0, 1])


@pytest.fixture(scope="module")
def two() -> list[Results]:
    """What two processes compute of one image each."""
    return in_turn(2, lambda rank: all_results([rank]))


def check(name: str, one: Results, two: list[Results]) -> None:
    """DistributedDataParallel averages what the processes have; an image is in one of them."""
    assert len(one[name]) > 5
    for key, expected in one[name].items():
        found: Any = sum(part[name][key] for part in two if key in part[name]) / 2
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_with_the_double_batch(
    one: Results, two: list[Results], name: str
) -> None:
    check(name, one, two)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("pgd", "reg"),
        ("atss", "loss_atss_loc"),
        ("autoassign", "loss_autoassign_pos"),
        ("ddod", "loss_ddod_loc"),
    ],
)
def test_each_on_its_own_would_differ(one: Results, name: str, loss: str) -> None:
    """By a twentieth and more: the objects are unevenly spread."""
    alone = [all_results([rank])[name][loss] for rank in range(2)]
    assert abs(sum(alone) / 2 - one[name][loss]) > 0.05 * one[name][loss]


@pytest.mark.slow
def test_over_gloo(tmp_path: Path, one: Results) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for name in NAMES:
        check(name, one, two)
