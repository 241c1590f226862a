import time
from itertools import groupby

import pytest
import torch

from kd_det.bench.measure import kept_bytes, peak_bytes, ratio, take_turns


def test_peak_counts_what_is_held_at_a_time():
    one_megabyte = torch.zeros(250_000)

    def run() -> None:
        for _ in range(3):
            (one_megabyte + 1).mul_(2)

    assert peak_bytes(run, "cpu") == pytest.approx(1e6, rel=0.01)


def test_functions_run_in_turn_and_sleep_costs_nothing():
    calls = []

    def work() -> None:
        calls.append("work")
        end = time.process_time() + 0.25
        while time.process_time() < end:
            pass

    def wait() -> None:
        calls.append("wait")
        time.sleep(0.01)
        sum(range(2_000_000))

    seconds = take_turns({"work": work, "wait": wait}, 2, "cpu", clock="cpu")
    assert calls[:3] == ["work", "wait", "work"] and calls.count("work") == 3
    assert all(0.25 <= value < 0.4 for value in seconds["work"])
    assert ratio(seconds["work"], seconds["wait"]) > 1
    assert ratio([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == 2


def test_turns_are_taken_in_rounds():
    order: list[str] = []
    runs = {name: lambda name=name: (order.append(name), time.sleep(0.03)) for name in "ab"}
    seconds = take_turns(runs, 3, "cpu")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    # Warm-up, then in every round several calls of each.
    turns = "".join(name for name, _ in groupby(order[2:]))
    assert order[:2] == ["a", "b"] and turns == "ab" * 3
    assert order.count("a") > 3 * 2


def test_kept_bytes_counts_each_storage_once_and_no_input():
    x = torch.ones(1000, requires_grad=True)

    def run() -> torch.Tensor:
        y = x.exp()  # kept by exp and, seen through a view, by the product
        return (y.view(10, 100) * y.view(10, 100)).sum() + (x * x).sum()

    assert kept_bytes(run, [x]) == 4000
