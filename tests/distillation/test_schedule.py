"""The course of a distiller's weight."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_det.config import add_kd_config
from kd_det.distillation.schedule import (
    Schedule,
    cosine_decay,
    linear_warmup,
    piecewise,
    stop_at,
)

quick = settings(max_examples=60, deadline=None)
iterations = st.integers(0, 10**6)
factors = st.floats(0, 10)


@pytest.mark.parametrize(
    ("iteration", "length", "expected"),
    [(0, 500, 0), (125, 500, 0.25), (499, 500, 0.998), (500, 500, 1), (9999, 500, 1), (0, 0, 1)],
)
def test_linear_warmup(iteration: int, length: int, expected: float) -> None:
    assert linear_warmup(iteration, length) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("iteration", "final", "expected"),
    [
        (0, 0.0, 1.0),
        (25, 0.0, 0.5 + math.sqrt(0.5) / 2),
        (50, 0.0, 0.5),
        (50, 0.2, 0.6),
        (100, 0.0, 0.0),
        (100, 0.2, 0.2),
        (250, 0.2, 0.2),
    ],
)
def test_cosine_decay(iteration: int, final: float, expected: float) -> None:
    assert cosine_decay(iteration, 100, final) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("iteration", "stop", "expected"),
    [(0, -1, 1), (10**6, -1, 1), (9, 10, 1), (10, 10, 0), (11, 10, 0), (0, 0, 0)],
)
def test_stop_at(iteration: int, stop: int, expected: float) -> None:
    assert stop_at(iteration, stop) == expected


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 1.0), (9, 1.0), (10, 0.5), (19, 0.5), (20, 2.0), (99, 2.0)]
)
def test_piecewise(iteration: int, expected: float) -> None:
    assert piecewise(iteration, [10, 20], [0.5, 2.0]) == expected


def test_all_factors_multiply() -> None:
    """4 * (8 / 10) * cosine(8 of 16) * 0.5 = 4 * 0.8 * (0.2 + 0.8 * 0.5) * 0.5."""
    schedule = Schedule(
        weight=4.0,
        total=16,
        warmup_iters=10,
        decay="cosine",
        final_factor=0.2,
        stop=12,
        steps=(5,),
        factors=(0.5,),
    )
    assert schedule(8) == pytest.approx(0.96)
    assert schedule(0) == 0
    assert schedule(4) == pytest.approx(4 * 0.4 * (0.2 + 0.4 * (1 + math.sqrt(0.5))))
    assert schedule(12) == 0


@given(iterations, factors)
@quick
def test_by_default_constant(iteration: int, weight: float) -> None:
    assert Schedule(weight=weight, total=100)(iteration) == weight


schedules = st.builds(
    Schedule,
    weight=factors,
    total=st.integers(0, 1000),
    warmup_iters=st.integers(0, 1000),
    decay=st.sampled_from(["constant", "cosine"]),
    final_factor=st.floats(0, 1),
    stop=st.integers(-1, 1000),
)


@given(schedules, st.lists(st.integers(0, 2000), min_size=1, max_size=5))
@quick
def test_bounded_and_a_pure_function_of_the_iteration(schedule: Schedule, order: list[int]) -> None:
    first = [schedule(i) for i in order]
    assert [schedule(i) for i in reversed(order)] == first[::-1]
    assert all(0 <= value <= schedule.weight * (1 + 1e-12) for value in first)
    with pytest.raises(FrozenInstanceError):
        schedule.weight = 3.0  # type: ignore[misc]


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(0, 1))
@quick
def test_monotonous(iteration: int, total: int, final: float) -> None:
    assert cosine_decay(iteration + 1, total, final) <= cosine_decay(iteration, total, final)
    assert linear_warmup(iteration + 1, total) >= linear_warmup(iteration, total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "WEIGHT must be finite and >= 0, found -1"),
        ({"weight": math.nan}, "WEIGHT must be finite and >= 0, found nan"),
        ({"weight": math.inf}, "WEIGHT must be finite and >= 0, found inf"),
        ({"decay": "linear"}, "DECAY is 'linear', expected 'constant', 'cosine' or 'auto'"),
        ({"steps": (1, 2), "factors": (0.5,)}, "STEPS has 2 entries and FACTORS 1; each step"),
        ({"steps": (5, 2), "factors": (0.5, 1.0)}, r"STEPS must ascend, found \[5, 2\]"),
        ({"final_factor": -0.5}, "FINAL_FACTOR must be finite and >= 0, found -0.5"),
        ({"steps": (1, 2), "factors": (1.0, -2.0)}, "FACTORS must be finite .* found 1.0, -2.0"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"weight": 1.0, "total": 10, **options})


def config() -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def test_reads_every_key_of_its_node() -> None:
    node = config().KD.FEATURE_LP
    changes = {
        "WARMUP_ITERS": 7,
        "DECAY": "cosine",
        "FINAL_FACTOR": 0.25,
        "STOP_AT": 90,
        "STEPS": [3],
        "FACTORS": [0.5],
    }
    assert set(changes) == set(node.SCHEDULE)
    node.WEIGHT = 3.0
    for key, value in changes.items():
        node.SCHEDULE[key] = value
    assert Schedule.from_config(node, 50) == Schedule(
        weight=3.0,
        total=50,
        warmup_iters=7,
        decay="cosine",
        final_factor=0.25,
        stop=90,
        steps=(3,),
        factors=(0.5,),
    )


def test_a_weight_that_sets_itself_decays_and_a_given_one_stays() -> None:
    for node in (config().KD.ALIGNED_PYRAMID, config().KD.PGD):
        course = Schedule.from_config(node, 1000)
        assert [course(i) for i in (0, 500, 1000)] == pytest.approx([1, 0.65, 0.3])
        node.WEIGHT = 3
        assert [Schedule.from_config(node, 1000)(i) for i in (0, 500, 999)] == [3.0] * 3
        node.SCHEDULE.DECAY, node.WEIGHT = "constant", None
        assert [Schedule.from_config(node, 1000)(i) for i in (0, 500, 999)] == [1.0] * 3


def test_what_makes_no_schedule_names_its_distiller() -> None:
    cfg = config()
    cfg.KD.FEATURE_LP.SCHEDULE.DECAY = "linear"
    with pytest.raises(ValueError, match=r"^KD\.FEATURE_LP: SCHEDULE.DECAY is 'linear', expected"):
        Schedule.of("FeatureLp", cfg)
