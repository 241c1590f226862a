"""
The losses of BCKD: each class score a binary problem, each box compared by its overlap.

Paper: Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
Detection", ICCV 2023. For positions r (with anchor) and classes k, p = sigmoid(z^S),
q = sigmoid(z^T) and d = |q - p|:

    L_cls = 1/N+ * sum_{r,k} V_r d_rk^beta CE(z^S_rk, q_rk)
    L_loc = 1/N+ * sum_r     V_r max_k d_rk (1 - GIoU(b^S_r, b^T_r))
    CE(x, q) = -q log sigmoid(x) - (1 - q) log(1 - sigmoid(x))

The paper has unnormalised sums and the IoU; the release divides by the batch's positives, averaged
over processes, and takes the GIoU. In its code a level without positives gives nothing, though
neither term needs them; here every level counts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from kd_det.functional.boxes import aligned_giou, aligned_iou
from kd_det.functional.focal import quality_focal_loss
from kd_det.functional.precision import at_least_float32

Overlap = Literal["giou", "iou"]


def classification_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalizer: float | Tensor,
    beta: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """
    Return L_cls of one level.

    Args:
        student, teacher: class logits, (N, R, K).
        normalizer: N+, at least 1.
        beta: exponent of the gap between the probabilities, which keeps its gradient: the minimum,
            at equal scores, is a kink with gradient 0.
        valid: V, (N, R) in {0, 1}, positions that count; None for all.

    Returns:
        Scalar >= 0, float32 at least; 0 for equal scores.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = at_least_float32(teacher.detach()).sigmoid()
        loss = quality_focal_loss(student, target, beta).sum(-1)
        return _sum_of_valid(loss, valid) / normalizer


def localization_loss(
    student: Tensor,
    teacher: Tensor,
    gap: Tensor,
    *,
    normalizer: float | Tensor,
    overlap: Overlap = "giou",
    valid: Tensor | None = None,
) -> Tensor:
    """
    Return L_loc of one level.

    Args:
        student, teacher: decoded boxes, (N, R, 4) corners in the same pixels.
        gap: max_k d, (N, R), see `scores.score_gap`.
        normalizer: N+, at least 1.
        overlap: "giou" (release) or "iou" (paper).
        valid: V, (N, R) in {0, 1}, positions that count; None for all.

    Returns:
        Scalar >= 0, float32 at least; 0 for equal boxes of positive area.

    Raises:
        ValueError: an unknown overlap.
    """
    if overlap not in get_args(Overlap):
        raise ValueError(f"overlap is {overlap!r}, expected 'giou' or 'iou'.")
    measure = aligned_giou if overlap == "giou" else aligned_iou
    with torch.autocast(student.device.type, enabled=False):
        own, other = at_least_float32(student), at_least_float32(teacher.detach())
        return _sum_of_valid(gap * (1 - measure(own, other)), valid) / normalizer


def _sum_of_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.sum() if valid is None else (values * valid).sum()
