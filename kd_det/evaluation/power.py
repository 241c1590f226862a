"""How many seeds a comparison needs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import nct, t

from kd_det.evaluation.difference import Difference, matched_dof

# Fewer give no verdict, or one that rests on a single degree of freedom.
FEWEST_SEEDS = 3


def power(
    effect: float,
    *,
    seeds: int,
    seed_sd: float,
    image_sd: float,
    images: int,
    confidence: float = 0.95,
) -> float:
    """
    Compute the chance that the interval of `kd_det.evaluation.difference` excludes zero.

    Args:
        effect: the true difference, AP points.
        seeds: at least 2.
        seed_sd: standard deviation of a single seed's difference, AP points.
        image_sd: what all seeds' differences share through the test images, AP points.
        images: of the test set, at least 2.
        confidence: of the interval.

    Returns:
        From 0 to 1, on either side of zero, by the noncentral t distribution.
    """
    of_seeds, shared = np.float64(seed_sd**2 / seeds), np.float64(image_sd**2)
    error = float(np.sqrt(of_seeds + shared))
    if error == 0:
        return float(effect != 0)
    doubt = shared**2 / (images - 1)
    dof = float(matched_dof(of_seeds, shared, doubt, seeds=seeds, level=1 - confidence))
    bound = float(t.ppf((1 + confidence) / 2, dof))
    shift = abs(effect) / error
    return float(nct.sf(bound, dof, shift) + nct.cdf(-bound, dof, shift))


def seeds_needed(
    effect: float,
    *,
    seed_sd: float,
    image_sd: float,
    images: int,
    target: float = 0.8,
    most: int = 200,
) -> int | None:
    """
    Count the seeds with which a difference is seen.

    Args:
        effect: the true difference, AP points, not 0.
        seed_sd: as for `power`.
        image_sd: as for `power`.
        images: as for `power`.
        target: the power wanted, between 0 and 1.
        most: the largest number tried.

    Returns:
        The smallest number from FEWEST_SEEDS on; None if `most` are too few: then more test images
        are needed, for these are noise that no seed takes away.
    """
    for seeds in range(FEWEST_SEEDS, most + 1):
        reached = power(effect, seeds=seeds, seed_sd=seed_sd, image_sd=image_sd, images=images)
        if reached >= target:
            return seeds
    return None


def pooled_spread(differences: Sequence[Difference]) -> tuple[float, float] | None:
    """Return the root mean squares of seed_sd and image_sd; None if none has several seeds."""
    measured = [(d.seed_sd, d.image_sd) for d in differences if d.seed_sd is not None]
    if not measured:
        return None
    seed_sd, image_sd = np.sqrt(np.mean(np.square(measured), axis=0))
    return float(seed_sd), float(image_sd)


def power_summary(
    differences: Sequence[Difference], *, effect: float = 0.5
) -> dict[str, Any] | None:
    """
    Say how many seeds the comparisons of one report would need.

    Args:
        differences: all of them, on one test set.
        effect: AP points.

    Returns:
        {"effect", "seed_sd", "image_sd", "seeds"}, with the spreads pooled and "seeds" None if no
        number is enough; None if no comparison has several seeds, or AP is not defined.
    """
    spread = pooled_spread(differences)
    if spread is None or not np.isfinite(spread).all():
        return None
    seed_sd, image_sd = spread
    images = differences[0].images
    needed = seeds_needed(effect, seed_sd=seed_sd, image_sd=image_sd, images=images)
    return {"effect": effect, "seed_sd": seed_sd, "image_sd": image_sd, "seeds": needed}
