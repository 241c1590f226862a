"""Intervals of a mean difference: numbers worked out by hand, and coverage in simulation."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import t

from kd_det.evaluation.bootstrap import SampledAP
from kd_det.evaluation.difference import (
    Difference,
    Floats,
    compare_arms,
    mean_difference,
    variance_and_dof,
)

IMAGES, REPEATS = 100, 4000
SEED_SPREADS = (0.0, 0.05, 0.1, 0.2)
IMAGE_SPREADS = (0.03, 0.07, 0.15)


class Draws(NamedTuple):
    """Experiments with noise of unit size: of seeds and of test images, with what is measured."""

    of_seeds: Floats  # (repeats, n)
    of_images: Floats  # (repeats, n)
    covariance: Floats  # (repeats, n, n) of `of_images`, from the images' own spread


def draw(seeds: int, *, interaction: float, skewed: bool, seed: int) -> Draws:
    """Every image moves all seeds by a common part, and each seed by a part of its own."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> Floats:
        return rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape)

    common = noise(REPEATS, 1, IMAGES) * math.sqrt(IMAGES * (1 - interaction))
    each = common + noise(REPEATS, seeds, IMAGES) * math.sqrt(IMAGES * interaction)
    mean = each.mean(axis=2)
    centred = each - mean[..., None]
    covariance = centred @ centred.swapaxes(1, 2) / (IMAGES - 1) / IMAGES
    return Draws(rng.normal(size=(REPEATS, seeds)), mean, covariance)


def coverage(
    draws: Draws, seed_spread: float, image_spread: float, truth: float, *, level: float = 0.05
) -> float:
    """How often the interval holds the truth, in percent."""
    per_seed = truth + seed_spread * draws.of_seeds + image_spread * draws.of_images
    covariance = image_spread**2 * draws.covariance
    variance, dof = variance_and_dof(per_seed, covariance, IMAGES - 1, level=level)
    half = t.ppf(1 - level / 2, dof) * np.sqrt(variance)
    return float(100 * (np.abs(per_seed.mean(axis=1) - truth) <= half).mean())


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("interaction", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover(seeds: int, interaction: float, skewed: bool) -> None:
    draws = draw(seeds, interaction=interaction, skewed=skewed, seed=seeds)
    for seed_spread, image_spread, truth in itertools.product(
        SEED_SPREADS, IMAGE_SPREADS, (0.0, 0.5)
    ):
        covered = coverage(draws, seed_spread, image_spread, truth)
        assert 93 <= covered <= 98, (seed_spread, image_spread, truth)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("interaction", [0.0, 0.3, 0.7])
def test_small_p_are_as_rare_as_they_say(seeds: int, interaction: float) -> None:
    """Holm's correction asks of 10 comparisons whether p is below 0.005."""
    draws = draw(seeds, interaction=interaction, skewed=False, seed=10 + seeds)
    for seed_spread, image_spread in itertools.product(SEED_SPREADS, IMAGE_SPREADS):
        wrong = 100 - coverage(draws, seed_spread, image_spread, 0.0, level=0.005)
        # Three standard errors of 0.11 above 0.5 %. Plain Welch-Satterthwaite: up to 2.7 %.
        assert wrong <= 0.85, (seed_spread, image_spread)


@pytest.mark.parametrize("image_spread", IMAGE_SPREADS)
def test_one_seed_covers_over_test_images_and_not_over_seeds(image_spread: float) -> None:
    draws = draw(1, interaction=0.3, skewed=False, seed=1)
    assert 93 <= coverage(draws, 0.0, image_spread, 0.5) <= 98
    assert coverage(draws, 0.2, image_spread, 0.5) < 90


def test_numbers_by_hand() -> None:
    # Seeds: sample variance 1, a third of it for the mean. Images: 0.2 beside the diagonal, 0.3 for
    # the mean at fixed seeds, so 0.1 of interaction. chi2 with 2 degrees of freedom is below
    # -2 ln(1 - q) with probability q = sqrt(0.05). Image dof: 1 / (1/100 + 1/100) = 50.
    covariance = np.full((3, 3), 0.2) + 0.3 * np.eye(3)
    found = mean_difference(np.array([1.0, 2.0, 3.0]), covariance, images=101, resamples=101)
    raised = (1 / 3) * 2 / (-2 * math.log(1 - math.sqrt(0.05)))
    dof = (raised + 0.2) ** 2 / (raised**2 / 2 + (0.3**2 + 0.1**2 / 2) / 50)
    assert found.dof == pytest.approx(dof) == pytest.approx(2.6478, abs=1e-4)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 3 + 0.2))
    half = 3.4359 * math.sqrt(1 / 3 + 0.2)  # t quantile of 2.6478 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(2 - half, abs=1e-3), 4 - found.low)
    assert found.mean == 2 and found.seed_sd == 1 and found.image_sd == pytest.approx(0.2**0.5)
    assert (found.seeds, found.images, found.method) == (3, 101, "seeds and test images")


def test_one_part_alone_keeps_its_degrees_of_freedom() -> None:
    seeds_alone = mean_difference(
        np.array([0.0, 0.3, 0.6]), np.zeros((3, 3)), images=50, resamples=999
    )
    assert seeds_alone.dof == 2
    assert seeds_alone.high == pytest.approx(0.3 + 4.3027 * 0.3 / math.sqrt(3), abs=1e-4)
    images_alone = mean_difference(
        np.full(3, 0.3), np.full((3, 3), 0.01), images=51, resamples=10**9
    )
    assert images_alone.dof == pytest.approx(50)
    assert images_alone.high == pytest.approx(0.3 + 2.0086 * 0.1, abs=1e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_p_is_the_level_whose_interval_touches_zero(confidence: float) -> None:
    covariance = np.full((3, 3), 0.01) + 0.01 * np.eye(3)

    def found(mean: float) -> Difference:
        per_seed = mean + np.array([-0.2, 0.0, 0.2])
        return mean_difference(
            per_seed, covariance, images=50, resamples=100, confidence=confidence
        )

    touching = found(found(0.0).high)
    assert touching.low == pytest.approx(0, abs=1e-12)
    assert touching.p == pytest.approx(1 - confidence)
    assert found(0.0).p == pytest.approx(1)
    assert found(1e9).p == pytest.approx(0, abs=1e-8)


def test_one_seed_gives_no_p() -> None:
    found = mean_difference(np.array([0.4]), np.array([[0.04]]), images=11, resamples=10**9)
    assert (found.p, found.seed_sd, found.method) == (None, None, "test images only")
    assert found.low == pytest.approx(0.4 - 2.2281 * 0.2, abs=1e-4)


def test_without_any_spread_the_mean_is_certain() -> None:
    def alike(value: float) -> Difference:
        return mean_difference(np.full(2, value), np.zeros((2, 2)), images=9, resamples=9)

    assert (alike(0.5).low, alike(0.5).high, alike(0.5).p) == (0.5, 0.5, 0.0)
    assert (alike(0.0).low, alike(0.0).high, alike(0.0).p) == (0.0, 0.0, 1.0)


def arm(per_seed: list[float], resampled: Floats, images: int = 5) -> SampledAP:
    return SampledAP(tuple(range(images)), np.array(per_seed), resampled, (len(resampled), 0))


def test_arms_are_compared_seed_by_seed_and_draw_by_draw() -> None:
    rng = np.random.default_rng(0)
    common, gain = rng.normal(size=(40, 1)), rng.normal(size=(40, 2))
    baseline = arm([10.0, 20.0], np.hstack([common, common]))
    other = arm([11.0, 23.0], common + gain)
    expected = mean_difference(
        np.array([1.0, 3.0]), np.cov(gain, rowvar=False) * 5 / 4, images=5, resamples=40
    )
    assert compare_arms(baseline, other) == expected
    back = compare_arms(other, baseline)
    assert (back.low, back.high) == (pytest.approx(-expected.high), pytest.approx(-expected.low))


def test_draws_without_an_object_do_not_count() -> None:
    values = np.array([[1.0], [np.nan], [3.0], [2.0]])
    baseline = arm([0.0], np.zeros((4, 1)))
    found = compare_arms(baseline, arm([2.0], values))
    assert found.standard_error == pytest.approx(math.sqrt(1 * 5 / 4))
    nothing = compare_arms(baseline, arm([math.nan], np.full((4, 1), np.nan)))
    assert math.isnan(nothing.low) and nothing.p is None


def test_what_does_not_fit_is_refused() -> None:
    two, one = arm([0.0, 0.0], np.zeros((4, 2))), arm([0.0], np.zeros((4, 1)))
    with pytest.raises(ValueError, match="2 seeds of the baseline and 1 of"):
        compare_arms(two, one)
    with pytest.raises(ValueError, match="different images"):
        compare_arms(one, arm([0.0], np.zeros((4, 1)), images=6))
    with pytest.raises(ValueError, match=r"\(4, 0\) for the baseline and \(3, 0\)"):
        compare_arms(one, arm([0.0], np.zeros((3, 1))))
    with pytest.raises(ValueError, match="found 1 test images"):
        compare_arms(arm([0.0], np.zeros((4, 1)), 1), arm([0.0], np.zeros((4, 1)), 1))
    with pytest.raises(ValueError, match="confidence is 95"):
        compare_arms(one, one, confidence=95)
    with pytest.raises(ValueError, match=r"2 differences and a covariance of shape \(1, 1\)"):
        mean_difference(np.zeros(2), np.zeros((1, 1)), images=5, resamples=5)
