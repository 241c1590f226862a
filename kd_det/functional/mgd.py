"""
The parts of MGD on one pyramid level: generate the teacher's map from a masked student's.

Paper: Yang et al., "Masked Generative Distillation", ECCV 2022. M keeps each cell with probability
1 - lambda, the same for all channels and without rescaling; G is conv 3x3 - ReLU - conv 3x3:

    L = 1/N * sum_{n,c,i,j} V (G(M * S) - T)^2

a sum, not a mean, over channels and cells. The release draws M from the global generator; here it
comes from a generator of the distiller's own. With V, padding is zero at the input of both
convolutions, as the border of a smaller map is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_det.functional.precision import at_least_float32


class GenerationBlock(nn.Module):
    """
    G, the trainable block between the masked student and the teacher; dropped after training.

    Args:
        channels: C of the teacher's map, which the student's has after its adapter.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(channels, channels, 3, padding=1)
        self.output = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, student: Tensor, keep: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Generate the teacher's map.

        Args:
            student: (N, C, H, W), any floating dtype.
            keep: M, (N, 1, H, W) in {0, 1}.
            valid: V, (N, 1, H, W) in {0, 1}, cells on the image; None for all.

        Returns:
            (N, C, H, W), float32 at least, whatever autocast says.
        """
        if valid is not None:
            keep = keep * valid
        with torch.autocast(student.device.type, enabled=False):
            hidden = self.hidden(at_least_float32(student) * keep).relu()
            if valid is not None:
                hidden = hidden * valid
            return self.output(hidden)


def generation_loss(generated: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Return the squared error per image, summed over channels and cells, masked and kept alike.

    Args:
        generated: G's output, (N, C, H, W).
        teacher: (N, C, H, W), any floating dtype.
        mask: V, (N, 1, H, W) in {0, 1}, cells that count; None for all.

    Returns:
        Scalar >= 0, float32 at least.
    """
    with torch.autocast(generated.device.type, enabled=False):
        error = (at_least_float32(generated) - at_least_float32(teacher.detach())).square()
        if mask is not None:
            error = error * mask
        return error.sum() / len(generated)


def mask_seed(base: int, *, rank: int, step: int) -> int:
    """Return the seed of a process's masks of one step: ranks and steps differ, runs repeat."""
    return base + 1000003 * rank + step


def draw_masks(
    sizes: Sequence[tuple[int, int, int]], masked_ratio: float, *, seed: int
) -> list[Tensor]:
    """
    Draw the cells that a student's maps keep.

    Args:
        sizes: (N, H, W) of each level.
        masked_ratio: lambda in [0, 1], probability of a cell to be masked.
        seed: see `mask_seed`; the global generator stays as it is.

    Returns:
        M per level, (N, 1, H, W) float32 in {0, 1}, on the CPU.

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0 <= masked_ratio <= 1:
        raise ValueError(f"masked_ratio is {masked_ratio}, expected a number from 0 to 1.")
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(n, 1, h, w, generator=generator) for n, h, w in sizes)
    return [(x >= masked_ratio).float() for x in drawn]
