import time

import pytest
import torch

from kd_det.cli.measure import peak_bytes, ratio, side_by_side


def test_peak_counts_what_is_held_at_a_time():
    one_megabyte = torch.zeros(250_000)

    def run() -> None:
        for _ in range(3):
            (one_megabyte + 1).mul_(2)

    assert peak_bytes(run) == pytest.approx(1e6, rel=0.01)


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

    seconds = side_by_side({"work": work, "wait": wait}, rounds=2, label="test")
    assert calls[:2] == ["work", "wait"] and calls.count("work") == 2
    assert all(0.25 <= value < 0.4 for value in seconds["work"])
    assert ratio(seconds["work"], seconds["wait"]) > 1
    assert ratio([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == 2
