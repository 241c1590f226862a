"""Sums and means over the processes of a job, for what losses are divided by and weighed with."""

import torch
from torch import Tensor, distributed


def sum_over_processes(value: Tensor) -> Tensor:
    """
    Add up a tensor over the processes of a job. Every process must call this, in the same order.

    Args:
        value: of one shape in all processes, any dtype; its gradient is not followed.

    Returns:
        The sum, floating; with a single process the value itself, bit for bit.
    """
    if not _several():
        return value.detach()
    total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    distributed.all_reduce(total)
    return total


def mean_over_processes(value: Tensor) -> Tensor:
    """
    Average a tensor over the processes of a job.

    Losses are averages over a process's own objects, and DistributedDataParallel averages gradients
    over processes. Where objects are unevenly spread, both together weight an object by how many
    others its process has. Dividing by the mean number instead gives each object the weight that it
    has when one process sees the whole batch. Every process must call this, in the same order.

    Args:
        value: of one shape in all processes, any dtype; its gradient is not followed.

    Returns:
        The mean, floating; with a single process the value itself, bit for bit.
    """
    total = sum_over_processes(value)
    return total / distributed.get_world_size() if _several() else total


def mean_number_over_processes(value: float, device: torch.device) -> float:
    """
    Average a number over the processes of a job; see `mean_over_processes`.

    Args:
        value: of this process.
        device: what the processes exchange tensors on.

    Returns:
        The mean; with a single process the value itself.
    """
    if not _several():
        return value
    return float(mean_over_processes(torch.tensor(float(value), device=device)))


def _several() -> bool:
    started = distributed.is_available() and distributed.is_initialized()
    return started and distributed.get_world_size() > 1
