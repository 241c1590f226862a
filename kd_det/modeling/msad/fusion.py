"""
Blending the pyramids of two resolutions (MSAD, Qi et al., CVPR 2021, arXiv 2109.06875).

Per level, with the maps P_high and P_low of the same shape and GAP the average over positions:

    w = softmax(W_2 ReLU(W_1 [GAP(P_high); GAP(P_low)])),    P_fused = w_1 P_high + w_2 P_low

One score per image, level and view. The paper averages over the padded area, too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_det.functional.level_grid import Grid, cells_on_images
from kd_det.functional.precision import at_least_float32

FUSIONS = ("cff", "mean")


class CrossingFeatureFusion(nn.Module):
    """C-FF: a learned convex combination of pyramids; one gate without biases for all levels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        """
        Build the gate; Kaiming-uniform initialisation with a = 1, as the authors' code has it.

        Args:
            channels: C of every map of both pyramids.
            reduction: the hidden layer has 2 * C / reduction units, at least one.

        Raises:
            ValueError: a reduction below 1.
        """
        super().__init__()
        if reduction < 1:
            raise ValueError(f"MODEL.ALIGNED.FUSION_REDUCTION is {reduction}, expected at least 1.")
        hidden = max(2 * channels // reduction, 1)
        self.squeeze = nn.Linear(2 * channels, hidden, bias=False)
        self.score = nn.Linear(hidden, 2, bias=False)
        for layer in (self.squeeze, self.score):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(
        self,
        high: Sequence[Tensor],
        low: Sequence[Tensor],
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """
        Blend two pyramids level by level.

        Args:
            high, low: L maps (N, C, H_l, W_l) each, fine to coarse, the same shapes in both.
            strides: of the L levels, in the pixels of `image_sizes`.
            image_sizes: N pairs (height, width) in pixels, without padding. Given: positions
                outside the images stay out of the pooling. None: they take part, as in the paper.

        Returns:
            L maps (N, C, H_l, W_l), in the pyramids' dtype.

        Raises:
            ValueError: shapes that differ between the pyramids.
        """
        _check_pyramids(high, low)
        fused = []
        for x, y, stride in zip(high, low, strides, strict=True):
            weights = self.weights(x, y, stride, image_sizes).to(x.dtype)[..., None, None, None]
            fused.append(x * weights[:, 0] + y * weights[:, 1])
        return fused

    def weights(
        self,
        high: Tensor,
        low: Tensor,
        stride: int,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """
        Score the two maps of one level.

        Args:
            high, low: (N, C, H, W).
            stride: of this level.
            image_sizes: as in `forward`.

        Returns:
            (N, 2), float32 (float64 for such maps); rows are positive and sum to 1.
        """
        # Sums over ten thousand positions and the softmax lose too much in half precision.
        with torch.autocast(high.device.type, enabled=False):
            pooled = torch.cat([_pool(x, stride, image_sizes) for x in (high, low)], dim=1)
            return torch.softmax(self.score(torch.relu(self.squeeze(pooled))), dim=1)


class MeanFusion(nn.Module):
    """The control of C-FF: the plain mean of the pyramids, no parameters."""

    def forward(
        self,
        high: Sequence[Tensor],
        low: Sequence[Tensor],
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """Average two pyramids level by level; arguments as in `CrossingFeatureFusion.forward`."""
        _check_pyramids(high, low)
        return [(x + y) / 2 for x, y in zip(high, low, strict=True)]


def build_fusion(name: str, channels: int, reduction: int) -> nn.Module:
    """
    Build a fusion by its name in the config.

    Args:
        name: "cff" or "mean".
        channels: C of the maps.
        reduction: of the hidden layer; "cff" alone uses it.

    Raises:
        ValueError: another name.
    """
    if name == "cff":
        return CrossingFeatureFusion(channels, reduction)
    if name == "mean":
        return MeanFusion()
    raise ValueError(f"MODEL.ALIGNED.FUSION is {name!r}; choose one of {', '.join(FUSIONS)}.")


def _check_pyramids(high: Sequence[Tensor], low: Sequence[Tensor]) -> None:
    shapes = [[tuple(x.shape) for x in pyramid] for pyramid in (high, low)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Fusion blends 2 pyramids of equal shapes, found {shapes}.")


def _pool(x: Tensor, stride: int, image_sizes: Sequence[tuple[int, int]] | None) -> Tensor:
    """Average (N, C, H, W) over the positions whose cell touches the image, to (N, C)."""
    x = at_least_float32(x)
    if image_sizes is None:
        return x.mean(dim=(2, 3))
    sizes = torch.tensor(image_sizes, device=x.device)
    # Offset 0: a cell takes part if any of it lies on the image.
    inside = cells_on_images(Grid(x.shape[2], x.shape[3], stride, offset=0.0), sizes).to(x.dtype)
    return torch.einsum("nchw,nhw->nc", x, inside) / inside.sum(dim=(1, 2))[:, None]
