"""
FGD: objects and background apart, where the teacher attends, and what relates all cells.

Paper: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022
(arXiv 2111.11837).

    L = sum over levels of  ALPHA L_fg + BETA L_bg + GAMMA L_at + LAMBDA_GLOBAL L_glo

L_fg and L_bg are squared errors inside and outside the ground truth's boxes, weighed by the
teacher's spatial and channel attention, L_at the distance of both models' attentions, L_glo that of
the maps with their global context, by two trainable blocks per level (`functional.fgd`).
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Step
from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.checks import expect_number
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.fgd import GlobalRelation, focal_terms, foreground_mask
from kd_det.functional.level_grid import to_device


@DISTILLER_REGISTRY.register()
class FGD(PyramidDistiller):
    """The focal terms ("fg", "bg", "attention") and the global one ("global")."""

    config_key = "FGD"
    share = share_of_trained = 1.0
    needs_boxes = True

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.FGD; its published WEIGHT is 1. Values are RetinaNet's and GFL's."""
        super().add_config(node)
        # The finest n pairs of levels; 0 for all.
        node.LEVELS = 0
        # Weights of foreground, background, attention and global context: RetinaNet, GFL 1e-3,
        # 5e-4, 5e-4, 5e-6; FCOS, RepPoints 1.6e-3, 8e-4, 8e-4, 8e-6; R-CNNs 5e-5, 2.5e-5, 5e-5,
        # 5e-7.
        node.ALPHA = 0.001
        node.BETA = 0.0005
        node.GAMMA = 0.0005
        node.LAMBDA_GLOBAL = 0.000005
        # Temperature of the attentions (FCOS: .8).
        node.TAU = 0.5
        # Padding is no background and takes part in nothing; the release has no such mask.
        node.MASK_PADDING = True

    def __init__(
        self,
        *,
        levels: int = 0,
        alpha: float = 0.001,
        beta: float = 0.0005,
        gamma: float = 0.0005,
        lambda_global: float = 0.000005,
        tau: float = 0.5,
        mask_padding: bool = True,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            levels, alpha, beta, gamma, lambda_global, tau: as the keys of KD.FGD.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: a value out of its range; the message names the key.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
            levels=levels,
        )
        for key, value in (("ALPHA", alpha), ("BETA", beta), ("GAMMA", gamma)):
            expect_number(f"KD.FGD.{key}", value)
        expect_number("KD.FGD.LAMBDA_GLOBAL", lambda_global)
        expect_number("KD.FGD.TAU", tau, low=1e-6)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.lambda_global = lambda_global
        self.tau = tau
        self.contexts = nn.ModuleList()

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """Make two global blocks for each pair."""
        self.contexts.extend(GlobalRelation(x.channels) for x in levels[self.spec.name])

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the four losses."""
        rows = []
        for pair, context in zip(step.pairs[self.spec.name], self.contexts, strict=True):
            size = pair.student.shape[2], pair.student.shape[3]
            foreground = foreground_mask(step.targets.boxes, size, pair.stride)
            valid = pair.valid()[:, 0].bool() if self.mask_padding else None
            focal = focal_terms(
                pair.student,
                pair.teacher,
                to_device(foreground, pair.student.device),
                tau=self.tau,
                valid=valid,
            )
            rows.append(torch.stack([*focal, context(pair.student, pair.teacher, valid)]))
        fg, bg, attention, whole = torch.stack(rows).sum(0)
        return {
            "fg": fg * self.alpha,
            "bg": bg * self.beta,
            "attention": attention * self.gamma,
            "global": whole * self.lambda_global,
        }
