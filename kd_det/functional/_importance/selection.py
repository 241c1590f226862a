"""The K best of each box for all boxes at once, by one sort."""

import torch
from torch import Tensor


def best_of_each(
    quality: Tensor, owner: Tensor, counts: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """
    Find each box's pairs of highest quality; of equal ones the first.

    Args:
        quality: (P,) in [0, 1], ranked in float32.
        owner: box of each pair, ascending, (P,).
        counts: pairs of each box, at least 1, (B,).
        top_k: K.

    Returns:
        Pairs, (B, K), and which of them exist and have a positive quality, (B, K) bool.
    """
    # The bits of a non-negative float grow with its value, so that one sort of integers orders by
    # box, then by quality. NaN of a broken teacher would go first; as 0 it goes last.
    bits = quality.float().nan_to_num(0.0).view(torch.int32)
    order = torch.argsort((owner + 1 << 32) - bits, stable=True)
    slot = torch.arange(top_k, device=quality.device)
    pair = order[((counts.cumsum(0) - counts)[:, None] + slot).clamp(max=len(order) - 1)]
    return pair, (slot < counts[:, None]) & (quality[pair] > 0)
