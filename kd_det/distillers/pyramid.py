"""What distillers that compare paired pyramid levels one by one have in common."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import AdapterMode, CaptureSpec, Distiller, Pair, Step


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
    ) -> None:
        """
        Args:
            mask_padding: leave the padded area of batched images out.
            student_capture, teacher_capture: module paths whose outputs are the pyramids.
            adapter: when the student's maps pass a 1x1 convolution.
        """
        super().__init__()
        self.mask_padding = mask_padding
        self.spec = CaptureSpec("features", student_capture, teacher_capture)
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
