"""
The difference between two arms that share seeds and a test set, with an interval that covers.

The difference D_s of seed s has four parts: the true one, noise of the test images that all seeds
share (variance t2), noise of the seed (s2), and what the seed makes of these images (i2):

    Var(mean over n seeds) = t2 + (s2 + i2) / n

The sample variance of the D_s estimates s2 + i2, on n - 1 degrees of freedom: t2 moves all seeds
alike and does not appear in it. Drawing images at fixed seeds gives the covariance C of the D_s:
i2 + t2 on its diagonal, t2 beside it. The mean beside the diagonal therefore is what the seeds do
not tell; adding the variance of the drawn mean (t2 + i2 / n) instead would count i2 twice.

    variance = sample variance / n + max(t2, 0)

Degrees of freedom are matched as by Welch and Satterthwaite. Their formula takes the parts for what
they were estimated to be; where few seeds agree by chance the image part then dominates, with its
many degrees of freedom: at three seeds a 95 % interval covers only 92 %, and p falls below 0.005
five times as often as it should. In that formula alone the seeds' part is therefore raised to the
bound that it exceeds with probability sqrt(level), level = 1 - confidence:

    a = sample variance / n * (n - 1) / chi2_{n-1}(sqrt(level))
    dof = (a + t2)^2 / (a^2 / (n - 1) + u^2),   u^2 = Var(estimate of t2) / 2

Where one part is alone, nothing changes. p is the level whose interval ends at zero.
`docs/intervals.md` has the coverage.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, t

from kd_det.evaluation.bootstrap import SampledAP

Floats = NDArray[np.float64]

_LEAST_P = 1e-9


@dataclass(frozen=True)
class Difference:
    """A mean difference in AP points (0 to 100), other minus baseline.

    Args:
        mean: over the seeds, on the test images as they are.
        low: lower bound of the interval.
        high: upper bound of the interval.
        standard_error: of the mean.
        dof: degrees of freedom of the interval's t quantile.
        p: level of the interval that ends at zero, two-sided; None with one seed, and where AP is
            not defined.
        seeds: how many. With one, the interval is over test images only.
        images: of the test set.
        seed_sd: sample standard deviation of a single seed's difference; None with one seed.
        image_sd: standard deviation that all seeds' differences share through the test images.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    dof: float
    p: float | None
    seeds: int
    images: int
    seed_sd: float | None
    image_sd: float

    @property
    def method(self) -> str:
        """What the interval takes into account."""
        return "seeds and test images" if self.seeds > 1 else "test images only"


def variance_and_dof(
    per_seed: Floats, covariance: Floats, image_dof: float, *, level: float = 0.05
) -> tuple[Floats, Floats]:
    """
    Estimate the variance of a mean over seeds, and its degrees of freedom.

    Args:
        per_seed: (..., n) a difference for every seed.
        covariance: (..., n, n) of these when test images are drawn at fixed seeds.
        image_dof: degrees of freedom of `covariance`.
        level: 1 - confidence.

    Returns:
        (...) variance and (...) degrees of freedom, at least n - 1. With n = 1 the variance is over
        test images only.
    """
    seeds = per_seed.shape[-1]
    if seeds == 1:
        variance = covariance[..., 0, 0]
        return variance, np.full_like(variance, image_dof)
    of_seeds = per_seed.var(axis=-1, ddof=1) / seeds
    shared, doubt = _shared_image_variance(covariance, image_dof)
    dof = matched_dof(of_seeds, shared, doubt, seeds=seeds, level=level)
    return of_seeds + shared, dof


def matched_dof(
    of_seeds: Floats, shared: Floats, doubt: Floats, *, seeds: int, level: float
) -> Floats:
    """
    Match degrees of freedom; the formula of this file.

    Args:
        of_seeds: variance of a mean over `seeds` seeds from them alone, not negative.
        shared: variance from the test images that all of them share, not negative.
        doubt: half of the variance of the estimate `shared`.
        seeds: at least 2.
        level: 1 - confidence, above 0.
    """
    seed_dof = seeds - 1
    raised = of_seeds * seed_dof / chi2.ppf(level**0.5, seed_dof)
    squares = raised**2 / seed_dof + doubt
    with np.errstate(invalid="ignore", divide="ignore"):
        dof = np.where(squares > 0, (raised + shared) ** 2 / squares, seed_dof)
    return np.maximum(dof, seed_dof)


def _shared_image_variance(covariance: Floats, image_dof: float) -> tuple[Floats, Floats]:
    """Return the mean beside the diagonal, at least 0, and half of its estimate's variance."""
    seeds = covariance.shape[-1]
    of_mean = covariance.mean(axis=(-2, -1))
    diagonal = np.trace(covariance, axis1=-2, axis2=-1) / seeds
    interaction = (diagonal - of_mean) / (seeds - 1)  # i2 / n
    doubt = (of_mean**2 + interaction**2 / (seeds - 1)) / image_dof
    return np.maximum(of_mean - interaction, 0.0), doubt


def mean_difference(
    per_seed: Floats,
    covariance: Floats,
    *,
    images: int,
    resamples: int,
    confidence: float = 0.95,
) -> Difference:
    """
    Give the mean over seeds its interval.

    Args:
        per_seed: (n,) the difference for every seed.
        covariance: (n, n) of these when test images are drawn at fixed seeds.
        images: of the test set; at least 2.
        resamples: how often they were drawn for `covariance`; at least 2.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: a shape, number or confidence that does not fit.
    """
    seeds = len(per_seed)
    if not seeds or covariance.shape != (seeds, seeds):
        raise ValueError(
            f"found {seeds} differences and a covariance of shape {covariance.shape}; expected "
            "at least one difference, and one row and column for each"
        )
    if min(images, resamples) < 2:
        raise ValueError(
            f"found {images} test images and {resamples} resamples; the spread over images needs "
            "at least 2 of both"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    image_dof = 1 / (1 / (images - 1) + 1 / (resamples - 1))
    level = 1 - confidence
    squared, matched = variance_and_dof(per_seed, covariance, image_dof, level=level)
    mean, error, dof = float(per_seed.mean()), float(np.sqrt(squared)), float(matched)
    half = float(t.ppf((1 + confidence) / 2, dof)) * error
    several = seeds > 1
    shared = _shared_image_variance(covariance, image_dof)[0] if several else squared
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        standard_error=error,
        dof=dof,
        p=_p_value(per_seed, covariance, image_dof) if several else None,
        seeds=seeds,
        images=images,
        seed_sd=float(per_seed.std(ddof=1)) if several else None,
        image_sd=float(np.sqrt(shared)),
    )


def _p_value(per_seed: Floats, covariance: Floats, image_dof: float) -> float | None:
    """Return the level whose interval ends at zero, not below _LEAST_P unless nothing spreads."""
    mean = abs(float(per_seed.mean()))

    def excess(level: float) -> float:
        """How far the t distribution's tail at this level's degrees of freedom exceeds it."""
        squared, dof = variance_and_dof(per_seed, covariance, image_dof, level=level)
        return float(2 * t.sf(mean / np.sqrt(squared), dof)) - level

    squared, _ = variance_and_dof(per_seed, covariance, image_dof)
    if not np.isfinite(mean + squared):
        return None
    if squared == 0:
        return 1.0 if mean == 0 else 0.0
    if excess(_LEAST_P) <= 0:
        return _LEAST_P
    return float(brentq(excess, _LEAST_P, 1.0))


def compare_arms(baseline: SampledAP, other: SampledAP, *, confidence: float = 0.95) -> Difference:
    """
    Compare two arms by AP.

    Args:
        baseline: AP of its seeds.
        other: AP of the arm compared, for the same seeds in the same order, on the same images and
            the same draws of them.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: different seeds, images or draws; and as `mean_difference`.
    """
    if len(baseline.per_seed) != len(other.per_seed):
        raise ValueError(
            f"found {len(baseline.per_seed)} seeds of the baseline and {len(other.per_seed)} of "
            "the other model; expected the same seeds of both"
        )
    if baseline.image_ids != other.image_ids:
        raise ValueError("the models were evaluated on different images; evaluate them on the same")
    if baseline.draws != other.draws:
        raise ValueError(
            f"images were drawn {baseline.draws} for the baseline and {other.draws} for the other "
            "model (times, random seed); expected the same draws"
        )
    drawn = other.resampled - baseline.resampled
    # A draw without any object has no AP.
    drawn = drawn[~np.isnan(drawn).any(axis=1)]
    images = len(baseline.image_ids)
    # The mean over the images drawn spreads by (images - 1) / images less than over new images.
    widened = images / max(images - 1, 1)
    seeds = drawn.shape[1]
    covariance = np.full((seeds, seeds), np.nan)
    if len(drawn) > 1:
        covariance = np.cov(drawn, rowvar=False).reshape(seeds, seeds) * widened
    return mean_difference(
        other.per_seed - baseline.per_seed,
        covariance,
        images=images,
        resamples=max(len(drawn), 2),
        confidence=confidence,
    )
