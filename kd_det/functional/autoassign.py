"""
AutoAssign (Zhu et al., "AutoAssign: Differentiable Label Assignment for Dense Object Detection",
arXiv 2007.03496): how much each position counts as positive and as negative.

For a box g of class c and the positions j in it, with p_jc = P(class c) P(object):

    G_jg  = prod over x, y of exp(-((pos - center) / stride - mean_c)^2 / (2 sigma_c^2))
    P_jg  = p_jc exp(-lambda (1 - GIoU(box_j, g)))
    w+_jg = e^(P_jg / tau) G_jg / sum_j e^(P_jg / tau) G_jg      pos:  -log(sum_j w+_jg P_jg)
    f_jg  = 1 / (1 - IoU_j), moved and scaled to [0, 1] in g
    w-_jc = 1 - f_jg inside a box of class c, else 1             neg:  -q^2 log(1 - q),  q = w- p

Pairs (j, g) of all images stand in flat lists of P entries; `box` (P,) says which of the G boxes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.functional.boxes import box_centers, strictly_inside

_EPS = 1e-12
# A prior this narrow (a hundredth of a stride) tells no two positions apart.
_SMALLEST_VARIANCE = 1e-4


@torch.no_grad()
def pairs_inside(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """
    Find all positions inside all boxes, on every level: there are no size ranges.

    Args:
        points: (R, 2) x and y in pixels.
        boxes: (G, 4) corners in pixels.

    Returns:
        `box` (P,) and position (P,), int64, box by box; the device is waited for once.
    """
    inside = strictly_inside(points, boxes[:, None])
    box, position = inside.nonzero(as_tuple=True)
    return box, position


def center_prior(
    points: Tensor, strides: Tensor, boxes: Tensor, mean: Tensor, sigma: Tensor
) -> Tensor:
    """
    Weigh positions by how they lie to the centre of their box.

    Args:
        points: (P, 2) x and y in pixels.
        strides: (P,) of their levels.
        boxes: (P, 4) corners in pixels.
        mean, sigma: (P, 2) of the box's class, x and y, in strides; the sign of sigma is of no
            matter.

    Returns:
        G, (P,) in [0, 1]; gradients reach mean and sigma.
    """
    distance = (points - box_centers(boxes)) / strides[:, None] - mean
    variance = sigma.square().clamp(min=_SMALLEST_VARIANCE)
    return (-distance.square() / (2 * variance)).sum(dim=1).exp()


def positive_terms(
    confidence: Tensor, prior: Tensor, box: Tensor, count: int, *, temperature: float = 1 / 3
) -> Tensor:
    """
    Score each box by its positions, those that predict it best before the others.

    Args:
        confidence: P, (P,) in [0, 1].
        prior: G, (P,) in [0, 1].
        box: (P,) int64 in [0, count).
        count: number of boxes.
        temperature: tau; smaller values leave each box to its best positions.

    Returns:
        (count,) -log of the mean of `confidence` with weights w+, at most 100; 0 for a box without
        position.
    """
    weight = (confidence / temperature).exp() * prior
    total = _sum_by_box(weight, box, count)
    mean = _sum_by_box(weight * confidence, box, count) / total.clamp(min=_EPS)
    held = _sum_by_box(torch.ones_like(prior), box, count) > 0
    # Rounding may lift a mean of ones above 1.
    mean = mean.where(held, 1).clamp(max=1)
    return F.binary_cross_entropy(mean, torch.ones_like(mean), reduction="none")


@torch.no_grad()
def foreground_share(overlap: Tensor, box: Tensor, count: int) -> Tensor:
    """
    Say how little each position of a box is a negative, compared with the others of that box.

    Args:
        overlap: (P,), the highest IoU of the position's predicted box with any box of its image.
        box: (P,) int64 in [0, count).
        count: number of boxes.

    Returns:
        f, (P,) in [0, 1]: 1 for the best position of a box.
    """
    value = 1 / (1 - overlap).clamp(min=_EPS)
    low = value.new_full((count,), math.inf).scatter_reduce(0, box, value, "amin")
    high = value.new_full((count,), -math.inf).scatter_reduce(0, box, value, "amax")
    return (value - low[box] + _EPS) / (high[box] - low[box] + _EPS)


@torch.no_grad()
def negative_weights(share: Tensor, position: Tensor, classes: Tensor, like: Tensor) -> Tensor:
    """
    Spread f over the map of all positions and classes.

    Args:
        share: f, (P,).
        position: (P,) int64, rows of `like`.
        classes: (P,) int64 of the boxes, columns of `like`.
        like: (Q, K), of which shape and type are read.

    Returns:
        w-, (Q, K) in [0, 1]: 1 - f at a box's positions and class, of several boxes of one class
        the smallest; 1 elsewhere.
    """
    weights = torch.ones_like(like)
    index = position * like.shape[1] + classes
    weights.view(-1).scatter_reduce_(0, index, 1 - share, "amin")
    return weights


def negative_terms(probabilities: Tensor) -> Tensor:
    """
    Focal loss against zero of weighted probabilities.

    Args:
        probabilities: q, any shape, in [0, 1].

    Returns:
        -q^2 log(1 - q), same shape; the logarithm is at least -100.
    """
    zeros = torch.zeros_like(probabilities)
    cross_entropy = F.binary_cross_entropy(probabilities, zeros, reduction="none")
    return probabilities.square() * cross_entropy


def center_terms(prior: Tensor, image: Tensor, counts: Tensor) -> Tensor:
    """
    Keep the prior wide enough to reach the positions of its boxes.

    Args:
        prior: G, (P,).
        image: (P,) int64 in [0, N), the image of each pair.
        counts: (N,) boxes of each image, those without position too.

    Returns:
        (N,) boxes over the sum of G; 0 for an image without any pair.
    """
    number = len(counts)
    held = _sum_by_box(torch.ones_like(prior), image, number) > 0
    total = _sum_by_box(prior, image, number).clamp(min=_EPS).where(held, 1)
    return (counts / total).where(held, 0)


def _sum_by_box(values: Tensor, box: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, box, values)
