"""
A distiller of one's own, outside kd_det: one minus the correlation of paired maps.

    L = sum over paired levels of  mean over n, c of  1 - corr(S, T)^POWER
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers import DISTILLER_REGISTRY, CaptureSpec, Distiller, Step


@DISTILLER_REGISTRY.register()
class Correlation(Distiller):
    """Correlation of every channel of every image with the teacher's."""

    config_key = "CORRELATION"  # its keys are KD.CORRELATION.*, its loss is loss_kd_correlation
    adapter = "auto"  # a 1x1 convolution where the channel counts differ

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.CORRELATION to those that every distiller has."""
        super().add_config(node)
        # Odd exponent of the correlation.
        node.POWER = 1

    def __init__(self, *, power: int = 1) -> None:
        super().__init__()
        self.power = power

    def captures(self) -> Sequence[CaptureSpec]:
        """Compare the pyramids of both backbones."""
        return [CaptureSpec("features", student="backbone", teacher="backbone")]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the single loss."""
        losses = [
            1 - correlation(p.student, p.teacher) ** self.power for p in step.pairs["features"]
        ]
        return {"": torch.stack([loss.mean() for loss in losses]).sum()}


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the correlation of two (N, C, H, W) maps over H and W, (N, C) in [-1, 1]."""
    s, t = student.float().flatten(2), teacher.float().flatten(2)
    return torch.cosine_similarity(s - s.mean(2, keepdim=True), t - t.mean(2, keepdim=True), dim=2)
