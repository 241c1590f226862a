"""
Blending pyramids of several resolutions (MSAD, Qi et al., CVPR 2021, arXiv 2109.06875).

Per level, with n maps P_1..P_n of the same shape and GAP the average over positions:

    w = softmax(W_2 ReLU(W_1 [GAP(P_1); ...; GAP(P_n)])),    P_fused = sum_j w_j P_j

One score per image, level and input. The paper has n = 2 and averages over the padded area, too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_det.functional.level_grid import Grid, cells_on_images
from kd_det.functional.precision import at_least_float32

FUSIONS = ("cff", "mean")


class CrossingFeatureFusion(nn.Module):
    """C-FF: a learned convex combination of pyramids; one gate without biases for all levels."""

    def __init__(self, channels: int, num_inputs: int = 2, reduction: int = 16) -> None:
        """
        Build the gate; Kaiming-uniform initialisation with a = 1, as the authors' code has it.

        Args:
            channels: C of every map of every pyramid.
            num_inputs: n >= 2, how many pyramids are blended.
            reduction: the hidden layer has n * C / reduction units, at least one.

        Raises:
            ValueError: fewer than two inputs, or a reduction below 1.
        """
        super().__init__()
        if num_inputs < 2 or reduction < 1:
            raise ValueError(
                f"Fusion blends at least 2 pyramids with a reduction of at least 1, found "
                f"{num_inputs} pyramids and reduction {reduction}."
            )
        self.num_inputs = num_inputs
        width = num_inputs * channels
        hidden = max(width // reduction, 1)
        self.squeeze = nn.Linear(width, hidden, bias=False)
        self.score = nn.Linear(hidden, num_inputs, bias=False)
        for layer in (self.squeeze, self.score):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(
        self,
        pyramids: Sequence[Sequence[Tensor]],
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """
        Blend n pyramids level by level.

        Args:
            pyramids: n lists of L maps (N, C, H_l, W_l), fine to coarse, the same shapes in all.
            strides: of the L levels, in the pixels of `image_sizes`.
            image_sizes: N pairs (height, width) in pixels, without padding. Given: positions
                outside the images stay out of the pooling. None: they take part, as in the paper.

        Returns:
            L maps (N, C, H_l, W_l), in the pyramids' dtype.

        Raises:
            ValueError: another number of pyramids than n, or shapes that differ between them.
        """
        _check_pyramids(pyramids, self.num_inputs)
        fused = []
        for stride, *maps in zip(strides, *pyramids, strict=True):
            weights = self.weights(maps, stride, image_sizes).to(maps[0].dtype)
            terms = [x * weights[:, j, None, None, None] for j, x in enumerate(maps)]
            fused.append(sum(terms[1:], terms[0]))
        return fused

    def weights(
        self,
        maps: Sequence[Tensor],
        stride: int,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """
        Score the n maps of one level.

        Args:
            maps: n maps (N, C, H, W).
            stride: of this level.
            image_sizes: as in `forward`.

        Returns:
            (N, n), float32 (float64 for such maps); rows are positive and sum to 1.
        """
        # Sums over ten thousand positions and the softmax lose too much in half precision.
        with torch.autocast(maps[0].device.type, enabled=False):
            pooled = torch.cat([_pool(x, stride, image_sizes) for x in maps], dim=1)
            return torch.softmax(self.score(torch.relu(self.squeeze(pooled))), dim=1)


class MeanFusion(nn.Module):
    """The control of C-FF: the plain mean of the pyramids, no parameters."""

    def __init__(self, num_inputs: int = 2) -> None:
        super().__init__()
        self.num_inputs = num_inputs

    def forward(
        self,
        pyramids: Sequence[Sequence[Tensor]],
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """Average n pyramids level by level; arguments as in `CrossingFeatureFusion.forward`."""
        _check_pyramids(pyramids, self.num_inputs)
        return [sum(maps[1:], maps[0]) / len(maps) for maps in zip(*pyramids, strict=True)]


def build_fusion(name: str, channels: int, num_inputs: int, reduction: int) -> nn.Module:
    """
    Build a fusion by its name in the config.

    Args:
        name: "cff" or "mean".
        channels: C of the maps.
        num_inputs: how many pyramids are blended.
        reduction: of the hidden layer; "cff" alone uses it.

    Raises:
        ValueError: another name.
    """
    if name == "cff":
        return CrossingFeatureFusion(channels, num_inputs, reduction)
    if name == "mean":
        return MeanFusion(num_inputs)
    raise ValueError(f"MODEL.ALIGNED.FUSION is {name!r}; choose one of {', '.join(FUSIONS)}.")


def _check_pyramids(pyramids: Sequence[Sequence[Tensor]], num_inputs: int) -> None:
    shapes = [[tuple(x.shape) for x in pyramid] for pyramid in pyramids]
    if len(shapes) != num_inputs or any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"Fusion blends {num_inputs} pyramids of equal shapes, found {len(shapes)}: {shapes}."
        )


def _pool(x: Tensor, stride: int, image_sizes: Sequence[tuple[int, int]] | None) -> Tensor:
    """Average (N, C, H, W) over the positions whose cell touches the image, to (N, C)."""
    x = at_least_float32(x)
    if image_sizes is None:
        return x.mean(dim=(2, 3))
    sizes = torch.tensor(image_sizes, device=x.device)
    # Offset 0: a cell takes part if any of it lies on the image.
    inside = cells_on_images(Grid(x.shape[2], x.shape[3], stride, offset=0.0), sizes).to(x.dtype)
    return torch.einsum("nchw,nhw->nc", x, inside) / inside.sum(dim=(1, 2))[:, None]
