"""Time and memory of functions, as the benchmarks measure them, on CPU and GPU."""

import time
import timeit
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)
# A function is called again and again until its calls of one round took this long together.
_ROUND_SECONDS = 0.2


def take_turns(
    runs: Mapping[Key, Callable[[], Any]],
    rounds: int,
    device: str,
    *,
    clock: Literal["wall", "cpu"] = "wall",
) -> dict[Key, list[float]]:
    """
    Time functions in turn, so that whatever else the machine does slows all of them alike.

    Args:
        runs: the functions, each called once before to warm up.
        rounds: measurements of each.
        device: "cpu", or a GPU to wait for.
        clock: "wall", or "cpu" for the seconds of all threads, which a GPU has not: on a busy
            machine wall time grows faster than work, because short calls escape the scheduler and
            long ones do not.

    Returns:
        For each function the seconds of its fastest call of each round.
    """
    timer = time.process_time if clock == device == "cpu" else time.perf_counter

    def timed(run: Callable[[], Any]) -> None:
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)

    for run in tqdm(runs.values(), desc="warm-up"):
        timed(run)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(rounds), desc="times", unit="round"):
        for key, run in runs.items():
            calls: list[float] = []
            while sum(calls) < _ROUND_SECONDS:
                calls.append(timeit.timeit(partial(timed, run), timer=timer, number=1))
            seconds[key].append(min(calls))
    return seconds


def ratio(seconds: list[float], others: list[float]) -> float:
    """Return the median over rounds of how many times as long one took as the other."""
    return median(a / b for a, b in zip(seconds, others, strict=True))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """
    Return how many bytes of tensors a function holds at most, beyond those that exist.

    On a CPU these are the events of torch's allocator, exact to the byte and blind to memory that
    libraries below torch take for themselves; on a GPU torch.cuda.max_memory_allocated.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


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


def device_name(device: str) -> str:
    """Return what a report calls the device: "cpu" or the GPU's name."""
    return device if device == "cpu" else torch.cuda.get_device_name(device)
