"""What distillers that compare paired pyramid levels one by one have in common."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import AdapterMode, CaptureSpec, Distiller, Pair, Step
from kd_det.distillers.checks import expect_number
from kd_det.functional.distance import cosine_distance, mean_distance, smooth_l1_distance
from kd_det.functional.ssim import ssim_loss

# Distances of a pair's maps by name: (student, teacher, mask=...) -> scalar.
DISTANCES: dict[str, Callable[..., Tensor]] = {
    "l1": partial(mean_distance, p=1),
    "l2": partial(mean_distance, p=2),
    "smooth_l1": smooth_l1_distance,
    "cosine": cosine_distance,
    "ssim": ssim_loss,
}


class PyramidDistiller(Distiller):
    """
    A distance between paired levels, summed over them.

    Subclasses give the distance of one pair and hand these arguments on.

    Attributes:
        spec: the two pyramids.
        mask_padding: only cells on the image count.
    """

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add which maps are compared, and how they are brought together."""
        super().add_config(node)
        # Module paths whose outputs are the pyramids; "path@1" is the second call of a module.
        node.STUDENT_CAPTURE = "backbone"
        node.TEACHER_CAPTURE = "backbone"
        # 1x1 convolution from the student's channels to the teacher's, dropped after training:
        # "auto" (where channel counts differ), "always" or "never".
        node.ADAPTER = "auto"
        # Leave the padded area of batched images out of the loss.
        node.MASK_PADDING = False

    def __init__(
        self,
        *,
        mask_padding: bool,
        student_capture: str,
        teacher_capture: str,
        adapter: AdapterMode,
        levels: int = 0,
    ) -> None:
        """
        Args:
            mask_padding: leave the padded area of batched images out.
            student_capture, teacher_capture: module paths whose outputs are the pyramids.
            adapter: when the student's maps pass a 1x1 convolution.
            levels: only the finest n pairs; 0 for all.

        Raises:
            ValueError: a negative number of levels.
        """
        super().__init__()
        self.mask_padding = mask_padding
        self.spec = CaptureSpec("features", student_capture, teacher_capture, levels=levels)
        expect_number(f"KD.{self.config_key}.LEVELS", levels)
        self.adapter = adapter

    def captures(self) -> Sequence[CaptureSpec]:
        """Return the one pyramid that is compared."""
        return [self.spec]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the single loss."""
        distances = [
            self.distance(pair, pair.valid() if self.mask_padding else None)
            for pair in step.pairs[self.spec.name]
        ]
        return {"": torch.stack(distances).sum()}

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """
        Compare the maps of one pair.

        Args:
            pair: student and teacher, on one grid.
            mask: (N, 1, H, W) in {0, 1}, cells that count; None for all.

        Returns:
            Scalar.
        """
        raise NotImplementedError
