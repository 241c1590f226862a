"""
MGD: generate the teacher's map from a masked map of the student.

Paper: Yang et al., "Masked Generative Distillation", ECCV 2022 (arXiv 2205.01529).

    L = sum over levels of  1/N * sum (G(M * S) - T)^2

M leaves each cell out with probability MASKED_RATIO, G is a convolution, a ReLU and a convolution,
trained with the student and dropped after training (`functional.mgd`).
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Step
from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.checks import expect_number
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.level_grid import to_device
from kd_det.functional.mgd import GenerationBlock, draw_masks, generation_loss, mask_seed


@DISTILLER_REGISTRY.register()
class MGD(PyramidDistiller):
    """
    Squared error of the generated maps, summed over levels.

    Masks come from a stream of its own, which goes on where it was when a run is resumed and leaves
    the data loader's alone.
    """

    config_key = "MGD"
    base: Tensor
    count: Tensor

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.MGD. Published weights: 2e-5 (one-stage), 5e-7 (two-stage)."""
        super().add_config(node)
        # The finest n pairs of levels; 0 for all.
        node.LEVELS = 0
        # Probability of a cell to be left out (the paper's lambda): .65 for one-stage detectors,
        # .45 for two-stage ones.
        node.MASKED_RATIO = 0.65

    def __init__(
        self,
        *,
        levels: int = 0,
        masked_ratio: float = 0.65,
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            levels: only the finest n pairs; 0 for all.
            masked_ratio: as the key of KD.MGD.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: a ratio outside [0, 1], or a negative number of levels.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
            levels=levels,
        )
        expect_number("KD.MGD.MASKED_RATIO", masked_ratio, high=1.0)
        self.masked_ratio = masked_ratio
        self.blocks = nn.ModuleList()
        # Where its stream is; buffers, so that checkpoints keep them.
        self.register_buffer("base", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        # Their numbers on the host, read once.
        self._seed: tuple[int, int] | None = None

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """Make a generation block for each pair."""
        self.blocks.extend(GenerationBlock(x.channels) for x in levels[self.spec.name])
        self.base.copy_(torch.randint(2**31, ()))

    def _load_from_state_dict(self, *args: object) -> None:
        """Forget the numbers read before."""
        self._seed = None
        super()._load_from_state_dict(*args)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the single loss."""
        pairs = step.pairs[self.spec.name]
        sizes = [(len(x.student), x.student.shape[2], x.student.shape[3]) for x in pairs]
        masks = draw_masks(sizes, self.masked_ratio, seed=self._next_seed(step))
        losses = []
        for pair, keep, block in zip(pairs, masks, self.blocks, strict=True):
            valid = pair.valid() if self.mask_padding else None
            generated = block(pair.student, to_device(keep, pair.student.device), valid)
            losses.append(generation_loss(generated, pair.teacher, valid))
        return {"": torch.stack(losses).sum()}

    def _next_seed(self, step: Step) -> int:
        if self._seed is None:
            # Every process drew a base; all take their mean, so that what the first one saves is
            # what each goes on with.
            self.base.copy_(step.mean(self.base.double()).round())
            self._seed = int(self.base), int(self.count)
        base, count = self._seed
        if self.training:
            self._seed = base, count + 1
            self.count += 1
        return mask_seed(base, rank=step.rank, step=count)
