"""
SSIM and its slopes from windowed means, variances and covariance, position by position.

With l the luminance term and c the product of contrast and structure:

    Q = dSSIM/dE[s^2] = -l c / (var_s + var_t + C2)
    R = dSSIM/dE[s t] = 2 l / (var_s + var_t + C2)
    P = dSSIM/dE[s]   = 2 (mu_t - mu_s l) c / (mu_s^2 + mu_t^2 + C1) - 2 E[s] Q - E[t] R

where E is the windowed mean of the maps less a constant per plane, and mu has the constant again.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of Wang et al. for maps in [0, 1]: they keep both quotients finite.
C1 = 0.01**2
C2 = 0.03**2

# Added to a variance, in units of C2, before its root: keeps the slope finite on flat patches where
# contrast or structure is taken alone.
STD_EPS = 1e-7


def similarity(
    smooth: Tensor,
    means: tuple[Tensor, Tensor],
    exponents: tuple[int, int, int],
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Compute SSIM and its slopes for the windowed maps.

    Args:
        smooth: (H, 4, K, W), the windowed s, t, s t and s^2 + t^2 of maps less a plane constant;
            (H, 5, K, W) with s^2 and t^2 apart if contrast or structure stands alone. Overwritten.
        means: the constants of s and of t, (K, 1).
        exponents: (luminance, contrast, structure), each 0 or 1.
        out: flat space for the slopes.

    Returns:
        SSIM (H, K, W), and its slopes P, Q, R (H, 3, K, W), a view of `out`.
    """
    smooth_s, smooth_t, product, square, *square_t = smooth.unbind(1)
    h, k, w = smooth_s.shape
    slopes = out[: 3 * h * k * w].view(h, 3, k, w)
    by_mean, by_variance, by_covariance = slopes.unbind(1)
    covariance = product.addcmul_(smooth_s, smooth_t, value=-1)
    variance = square.addcmul_(smooth_s, smooth_s, value=-1)
    luminance, contrast, structure = exponents
    if square_t:
        variance_t = square_t[0].addcmul_(smooth_t, smooth_t, value=-1)
        term = _contrast_term if contrast else _structure_term
        value, *by = term(variance, variance_t, covariance)
        by_variance.copy_(by[0])
        by_covariance.copy_(by[1])
    elif contrast and structure:
        below = variance.addcmul_(smooth_t, smooth_t, value=-1).add_(C2)  # of both maps
        value = covariance.mul_(2).add_(C2).div_(below)
        torch.div(value, below, out=by_variance).neg_()
        torch.reciprocal(below, out=by_covariance).mul_(2)
    else:
        value = torch.ones_like(smooth_s)
        slopes.zero_()

    if luminance:
        mean_s, mean_t = smooth_s + means[0], smooth_t + means[1]
        below = (mean_s * mean_s).addcmul_(mean_t, mean_t).add_(C1)
        luminance_term = (mean_s * mean_t).mul_(2).add_(C1).div_(below)
        torch.addcmul(mean_t, mean_s, luminance_term, value=-1, out=by_mean)
        by_mean.mul_(value).div_(below).mul_(2)
        slopes[:, 1:] *= luminance_term[:, None]
        value = value * luminance_term
    else:
        by_mean.zero_()
    by_mean.addcmul_(smooth_s, by_variance, value=-2).addcmul_(smooth_t, by_covariance, value=-1)
    return value, slopes


_Term = tuple[Tensor, Tensor, Tensor]  # value, slope for the student's variance, for the covariance


def _contrast_term(variance_s: Tensor, variance_t: Tensor, covariance: Tensor) -> _Term:
    std_s, std_t = (x.clamp_min(0).add(STD_EPS * C2).sqrt() for x in (variance_s, variance_t))
    below = std_s**2 + std_t**2 + C2
    value = (2 * std_s * std_t + C2) / below
    by_std = 2 * (std_t - value * std_s) / below
    return value, by_std * (variance_s > 0) / (2 * std_s), torch.zeros_like(covariance)


def _structure_term(variance_s: Tensor, variance_t: Tensor, covariance: Tensor) -> _Term:
    std_s, std_t = (x.clamp_min(0).add(STD_EPS * C2).sqrt() for x in (variance_s, variance_t))
    below = std_s * std_t + C2 / 2
    value = (covariance + C2 / 2) / below
    by_std = -value * std_t / below
    return value, by_std * (variance_s > 0) / (2 * std_s), 1 / below
