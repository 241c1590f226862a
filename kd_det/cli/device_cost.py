"""Time and memory of functions with a backward pass, on CPU and GPU."""

import timeit
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from kd_det.cli import measure

Key = TypeVar("Key", bound=Hashable)


def take_turns(
    runs: Mapping[Key, Callable[[], Any]], rounds: int, device: str
) -> dict[Key, list[float]]:
    """
    Time functions in turn, so that whatever else the machine does slows all of them alike.

    Args:
        runs: the functions, each called once before to warm up.
        rounds: measurements of each; those of less than 0.2 s are the fastest of five calls.
        device: "cpu", or a GPU to wait for.

    Returns:
        Seconds of each round, by the clock on the wall: the device works beside the process.
    """

    def timed(run: Callable[[], Any]) -> None:
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)

    calls = {}
    for key, run in tqdm(runs.items(), desc="warm-up"):
        timed(run)
        calls[key] = 1 if timeit.timeit(partial(timed, run), number=1) > 0.2 else 5
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(rounds), desc="times", unit="round"):
        for key, run in runs.items():
            turns = timeit.repeat(partial(timed, run), number=1, repeat=calls[key])
            seconds[key].append(min(turns))
    return seconds


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """
    Return how many bytes of tensors a function holds at most, beyond those that exist.

    On a CPU these are the events of torch's allocator, exact to the byte and blind to memory that
    libraries below torch take for themselves; on a GPU torch.cuda.max_memory_allocated.
    """
    if device == "cpu":
        return measure.peak_bytes(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(run: Callable[[], Any], inputs: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages a function keeps for backward, beside its inputs."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
