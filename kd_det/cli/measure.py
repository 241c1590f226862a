"""Timing and memory of functions, as the benchmarks measure them."""

import time
import timeit
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


def side_by_side(
    runs: dict[Any, Callable[[], Any]], rounds: int, label: str
) -> dict[Any, list[float]]:
    """
    Time functions in turn, so that whatever else the machine does slows all of them alike.

    Args:
        runs: the functions; call each once before, where the first call is slower.
        rounds: how often to go through all of them.
        label: title of the progress bar.

    Returns:
        For each function and round the CPU seconds, of all threads, of its fastest call within a
        fifth of a second. CPU time, because on a busy machine wall time grows faster than work:
        short calls escape the scheduler, long ones do not.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(rounds), desc=label, unit="round"):
        for key, run in runs.items():
            calls = [timeit.timeit(run, timer=time.process_time, number=1)]
            while sum(calls) < 0.2:
                calls.append(timeit.timeit(run, timer=time.process_time, number=1))
            seconds[key].append(min(calls))
    return seconds


def ratio(seconds: list[float], others: list[float]) -> float:
    """Return the median over rounds of how many times as long one took as the other."""
    return median(a / b for a, b in zip(seconds, others, strict=True))


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors a function holds at most, beyond those that exist."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))
