"""Verdicts, Holm's correction and the number of seeds, on numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import t

from kd_det.evaluation.difference import Difference, variance_and_dof
from kd_det.evaluation.power import (
    FEWEST_SEEDS,
    pooled_spread,
    power,
    power_summary,
    seeds_needed,
)
from kd_det.evaluation.verdict import holm, judge, verdict

BASE = Difference(
    mean=0.0,
    low=0.0,
    high=0.0,
    standard_error=0.1,
    dof=2.0,
    p=0.5,
    seeds=3,
    images=100,
    seed_sd=0.1,
    image_sd=0.1,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.9, "gain"),
        (0.01, 0.2, "gain"),
        (-0.9, -0.01, "loss"),
        (-0.1, 0.29, "no gain"),
        (-0.29, 0.1, "no gain"),
        (-0.1, 0.31, "inconclusive"),
        (-0.31, 0.1, "inconclusive"),
        (0.0, 0.4, "inconclusive"),
        (float("nan"), float("nan"), "inconclusive"),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    found = dataclasses.replace(BASE, low=low, high=high)
    assert verdict(found) == expected
    one = dataclasses.replace(found, seeds=1, seed_sd=None, p=None)
    assert verdict(one) == "no verdict (one seed)"


def test_what_matters_in_practice_can_be_set() -> None:
    found = dataclasses.replace(BASE, low=-0.4, high=0.4)
    assert verdict(found, practical=0.5) == "no gain"
    with pytest.raises(ValueError, match="practical is 0"):
        verdict(found, practical=0)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the 0.06 before it, 0.04 * 1 likewise.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested() -> None:
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]


def test_power_with_one_part_is_that_of_a_paired_t_test() -> None:
    # Tables (Cohen 1988): a paired t test sees one standard deviation with 80 % power from 10 on.
    assert seeds_needed(1.0, seed_sd=1.0, image_sd=0.0, images=100) == 10
    assert power(1.0, seeds=10, seed_sd=1.0, image_sd=0.0, images=100) == pytest.approx(
        0.803, abs=1e-3
    )
    assert power(0.0, seeds=5, seed_sd=0.2, image_sd=0.1, images=100) == pytest.approx(0.05)
    assert power(0.1, seeds=5, seed_sd=0.0, image_sd=0.0, images=100) == 1
    assert power(0.0, seeds=5, seed_sd=0.0, image_sd=0.0, images=100) == 0


def test_no_number_of_seeds_removes_the_noise_of_images() -> None:
    assert seeds_needed(0.5, seed_sd=0.2, image_sd=0.2, images=100) is None
    assert seeds_needed(0.5, seed_sd=0.01, image_sd=0.1, images=100) == FEWEST_SEEDS


@pytest.mark.parametrize(("seed_sd", "image_sd"), [(0.2, 0.05), (0.3, 0.1), (0.4, 0.15)])
def test_the_seeds_needed_are_enough_and_hardly_more(seed_sd: float, image_sd: float) -> None:
    images, repeats = 300, 20000
    seeds = seeds_needed(0.5, seed_sd=seed_sd, image_sd=image_sd, images=images)
    assert seeds is not None and seeds > FEWEST_SEEDS
    rng = np.random.default_rng(0)

    def seen(count: int) -> float:
        noise = rng.normal(size=(repeats, 1)) * image_sd
        per_seed = 0.5 + noise + rng.normal(size=(repeats, count)) * seed_sd
        shared = image_sd**2 * rng.chisquare(images - 1, size=repeats) / (images - 1)
        covariance = np.broadcast_to(shared[:, None, None], (repeats, count, count))
        variance, dof = variance_and_dof(per_seed, covariance, images - 1)
        return float((per_seed.mean(axis=1) > t.ppf(0.975, dof) * np.sqrt(variance)).mean())

    assert seen(seeds) > 0.77
    assert seen(seeds - 1) < 0.83


def test_spreads_are_pooled_as_variances() -> None:
    three, four = (dataclasses.replace(BASE, seed_sd=s, image_sd=s / 2) for s in (3.0, 4.0))
    one = dataclasses.replace(BASE, seeds=1, seed_sd=None)
    assert pooled_spread([three, one, four]) == (
        pytest.approx(12.5**0.5),
        pytest.approx(12.5**0.5 / 2),
    )
    assert pooled_spread([one]) is None


def test_a_report_judges_its_comparisons_together() -> None:
    clear = dataclasses.replace(BASE, mean=0.5, low=0.1, high=0.9, p=0.03)
    one = dataclasses.replace(BASE, seeds=1, seed_sd=None, p=None)
    first, second, third = judge([clear, one, clear])
    assert (first["verdict"], first["p"], first["holm"]) == ("gain", 0.03, pytest.approx(0.06))
    assert (second["verdict"], second["holm"]) == ("no verdict (one seed)", None)
    assert second["method"] == "test images only" and third["method"] == "seeds and test images"
    assert (third["mean"], third["dof"], third["images"]) == (0.5, 2.0, 100)


def test_a_report_says_how_many_seeds_it_needs() -> None:
    one = dataclasses.replace(BASE, seeds=1, seed_sd=None)
    assert power_summary([one]) is None
    assert power_summary([]) is None
    assert power_summary([dataclasses.replace(BASE, image_sd=float("nan"))]) is None
    found = power_summary([BASE, BASE])
    assert found is not None and found["seeds"] == seeds_needed(
        0.5, seed_sd=0.1, image_sd=0.1, images=100
    )
    assert (found["effect"], found["seed_sd"]) == (0.5, pytest.approx(0.1))
