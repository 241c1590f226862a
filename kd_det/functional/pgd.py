"""
The losses of PGD on one pyramid level.

Paper: Yang et al., "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022
(arXiv 2203.05469). For the outputs F of the first tower block, S student's and T teacher's, at
channel c and position p:

    attention       A_cp = C * softmax_c(|F_cp| / tau)
                    S_p = H * W * softmax_p(mean_c |F_cp| / tau)
    error           E_p = sum_c A^T_cp (F^S_cp - F^T_cp)^2
    classification  L_fg = 1/N sum M_p S^T_p E_p
                    L_bg = 1/N sum Mbg_p S^T_p E_p
                    L_att = 1/(N H W) sum |A^S - A^T| + 1/N sum |S^S - S^T|
    regression      L_fea = 1/|R| sum_{p in R} I_p E_p / C
                    L_att = 1/|R| sum_{p in R} sum_c |A^S_cp - A^T_cp|

M is the importance I and Mbg the background, each divided by the number of its non-zero positions
in that image; R are the positions of the batch with I > 0. The release weights the classification
features of each image by the masks of all images of the batch: `mask_scope="batch"`. With `valid`,
padding takes no part in anything.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kd_det.functional.attention import compare_features, spatial_attention

MaskScope = Literal["image", "batch"]


class ClassificationTerms(NamedTuple):
    """The parts of the classification loss of one level, unweighted scalars."""

    foreground: Tensor
    background: Tensor
    attention: Tensor

    def weighted(
        self, alpha: float, beta: float, delta: float, level_weight: float = 1.0
    ) -> Tensor:
        """Return level_weight * (alpha * foreground + beta * background) + delta * attention."""
        features = alpha * self.foreground + beta * self.background
        return level_weight * features + delta * self.attention


class RegressionTerms(NamedTuple):
    """The parts of the regression loss of one level, unweighted scalars."""

    foreground: Tensor
    attention: Tensor

    def weighted(self, gamma: float, delta: float) -> Tensor:
        """Return gamma * foreground + delta * attention."""
        return gamma * self.foreground + delta * self.attention


def mean_mask(mask: Tensor) -> Tensor:
    """Divide each image of a mask, (N, H, W), by the number of its non-zero positions."""
    return mask / (mask != 0).sum((1, 2), keepdim=True).clamp(min=1)


def classification_terms(
    student: Tensor,
    teacher: Tensor,
    importance: Tensor,
    background: Tensor,
    tau: float = 0.8,
    valid: Tensor | None = None,
    mask_scope: MaskScope = "image",
) -> ClassificationTerms:
    """
    Compare the features of the classification towers on one level.

    Args:
        student, teacher: (N, C, H, W), any floating dtype; computed in float32 or wider.
        importance: I in [0, 1], (N, H, W), without gradient.
        background: bool or 0/1, (N, H, W); positions inside no object.
        tau: temperature of both attentions.
        valid: (N, H, W) bool, False on padding; None counts all positions (release).
        mask_scope: whose masks weight an image: its own, or the sum over the batch (release).

    Returns:
        The terms; their gradients reach the student alone. Exactly zero for equal features.

    Raises:
        ValueError: if shapes do not match or `mask_scope` is unknown.
    """
    if valid is None:
        valid = torch.ones_like(background, dtype=torch.bool)
    _check(student, teacher, importance, background, valid)
    if mask_scope not in ("image", "batch"):
        raise ValueError(f"mask_scope is {mask_scope!r}. Expected 'image' or 'batch'.")
    compared = compare_features(student, teacher, tau)
    num_images = student.shape[0]
    foreground = mean_mask(importance.to(compared.error) * valid)
    background = mean_mask(background.to(compared.error) * valid)
    if mask_scope == "batch":
        foreground, background = foreground.sum(0), background.sum(0)
    teacher_spatial = spatial_attention(compared.teacher_magnitude, tau, valid)
    student_spatial = spatial_attention(compared.student_magnitude, tau, valid)
    error = teacher_spatial * compared.error
    channel_distance = mean_mask(valid.to(error)) * compared.attention_distance
    spatial_distance = (student_spatial - teacher_spatial).abs()
    return ClassificationTerms(
        foreground=(foreground * error).sum() / num_images,
        background=(background * error).sum() / num_images,
        attention=(channel_distance + spatial_distance).sum() / num_images,
    )


def regression_terms(
    student: Tensor,
    teacher: Tensor,
    importance: Tensor,
    tau: float = 0.8,
    count: Tensor | None = None,
) -> RegressionTerms:
    """
    Compare the features of the regression towers on one level.

    Args:
        student, teacher: (N, C, H, W), any floating dtype; computed in float32 or wider.
        importance: I in [0, 1], (N, H, W), without gradient.
        tau: temperature of the channel attention.
        count: what to divide by, a scalar; None counts the positions of this batch with I > 0.
            With several processes, the mean of `count_selected` over them.

    Returns:
        The terms, averaged over the positions of the batch with I > 0; zero, but attached to the
        graph, where there is none. Their gradients reach the student alone.

    Raises:
        ValueError: if shapes do not match.
    """
    _check(student, teacher, importance)
    compared = compare_features(student, teacher, tau)
    selected = importance != 0
    if count is None:
        count = count_selected(importance)
    # The mean over processes may be below 1; without any position the sums are 0.
    count = torch.where(count > 0, count, 1)
    error = compared.error / student.shape[1]
    return RegressionTerms(
        foreground=(importance * error).sum() / count,
        attention=(selected * compared.attention_distance).sum() / count,
    )


def count_selected(importance: Tensor) -> Tensor:
    """Return the number of positions with I > 0, a whole scalar."""
    return (importance != 0).sum()


def _check(student: Tensor, teacher: Tensor, *masks: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student features have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}. PGD compares towers of equal width on equal grids: choose "
            "such models, or put an adapter between them."
        )
    grid = student.shape[:1] + student.shape[2:]
    for mask in masks:
        if mask.shape != grid:
            raise ValueError(
                f"A mask has shape {tuple(mask.shape)}. Expected {tuple(grid)}, the features' grid."
            )
