"""Pyramids of several resolutions: which levels pair, and an FPN that computes no others."""

from collections.abc import Iterable, Mapping, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor
from torch.nn import functional as F


class LevelSelectingFPN(Backbone):
    """
    Takes over the modules of a Detectron2 `FPN`, with their names, and skips levels nobody wants.

    Detectron2's FPN computes every level it has. A full view that starts at p3 would pay for p2's
    output convolution, the most expensive one of the pyramid; one that ends at p6, for p7.
    """

    def __init__(self, fpn: FPN, size_divisibility: int) -> None:
        """
        Take over an FPN.

        Args:
            fpn: the FPN; it shares its modules with this one.
            size_divisibility: image sides are padded to a multiple of this, in pixels.

        Raises:
            TypeError: not an FPN of Detectron2, or a subclass that computes its levels otherwise.
        """
        super().__init__()
        if not isinstance(fpn, FPN) or type(fpn).forward is not FPN.forward:
            raise TypeError(
                f"Levels can be selected in Detectron2's FPN, found a backbone of type "
                f"{type(fpn).__name__}; choose an FPN builder as MODEL.BACKBONE.NAME."
            )
        for name, child in fpn.named_children():
            self.add_module(name, child)
        self._shape: dict[str, ShapeSpec] = fpn.output_shape()
        self._divisibility = size_divisibility
        names = list(self._shape)
        # From coarse to fine, as the FPN lists its convolutions: level, map below, convolutions.
        self._path = list(
            zip(
                reversed(names[: len(fpn.in_features)]),
                reversed(fpn.in_features),
                fpn.lateral_convs,
                fpn.output_convs,
                strict=True,
            )
        )
        self._extras = names[len(fpn.in_features) :]
        # The one thing that an FPN tells nobody: whether levels are summed or averaged.
        self._average = fpn._fuse_type == "avg"

    @property
    def size_divisibility(self) -> int:
        """Pixels that image sides must be a multiple of."""
        return self._divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level there is, fine to coarse."""
        return self._shape

    def forward(self, x: Tensor, levels: Sequence[str] | None = None) -> dict[str, Tensor]:
        """
        Compute pyramid levels.

        Args:
            x: images (N, 3, H, W).
            levels: names of the wanted levels, e.g. ("p3", "p4"); None: all.

        Returns:
            The wanted levels by name, fine to coarse, exactly as Detectron2's FPN computes them.

        Raises:
            ValueError: a level that this FPN lacks.
        """
        wanted = list(self._shape) if levels is None else list(levels)
        missing = [level for level in wanted if level not in self._shape]
        if missing:
            raise ValueError(f"This FPN has no {missing}; it has {', '.join(self._shape)}.")
        bottom_up = self.bottom_up(x)
        extras = [level for level in self._extras if level in wanted]
        needed = {*wanted, self.top_block.in_feature} if extras else set(wanted)
        results = self._top_down(bottom_up, needed)
        if extras:
            source = self.top_block.in_feature
            results |= self._extra(
                bottom_up[source] if source in bottom_up else results[source], extras
            )
        return {level: results[level] for level in self._shape if level in wanted}

    def _top_down(self, bottom_up: dict[str, Tensor], needed: set[str]) -> dict[str, Tensor]:
        """Return the needed lateral levels; the path goes no further down than the finest."""
        results: dict[str, Tensor] = {}
        remaining = needed & {level for level, *_ in self._path}
        path: Tensor | None = None
        for level, feature, lateral_conv, output_conv in self._path:
            if not remaining:
                break
            lateral = lateral_conv(bottom_up[feature])
            if path is None:
                path = lateral
            else:
                path = lateral + F.interpolate(path, scale_factor=2.0, mode="nearest")
                path = path / 2 if self._average else path
            if level in remaining:
                results[level] = output_conv(path)
                remaining.remove(level)
        return results

    def _extra(self, source: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return levels of the top block; it computes all of its own, save where p6 is enough."""
        if isinstance(self.top_block, LastLevelP6P7) and list(wanted) == self._extras[:1]:
            return {self._extras[0]: self.top_block.p6(source)}
        return dict(zip(self._extras, self.top_block(source), strict=True))


def paired_levels(
    shapes: Mapping[str, ShapeSpec], levels: Iterable[str], factor: int
) -> tuple[list[str], list[str]]:
    """
    Pair pyramid levels of the full view with those of a view reduced by a factor.

    Args:
        shapes: all levels of the backbone, with strides in the pixels of the view it is run on.
        levels: those that the heads read in the full view.
        factor: a power of two, at least 2.

    Returns:
        The levels of the full view and those of the reduced view on the same grids; fine to coarse.

    Raises:
        ValueError: another factor, or a reduced view that needs a level the backbone lacks.
    """
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"MODEL.ALIGNED.FACTOR must be 2, 4, 8, ..., found {factor}.")
    high = sorted(levels, key=lambda level: shapes[level].stride)
    by_stride = {shape.stride: level for level, shape in shapes.items()}
    missing = [level for level in high if shapes[level].stride / factor not in by_stride]
    if missing:
        wanted = ", ".join(f"{shapes[level].stride / factor:g}" for level in missing)
        present = ", ".join(f"{level} (stride {stride})" for stride, level in by_stride.items())
        raise ValueError(
            f"The heads read {', '.join(high)} of the full view. In the view reduced by {factor} "
            f"the partners of {', '.join(missing)} have stride {wanted}, but the backbone has "
            f"{present}. Let IN_FEATURES of the heads start at stride {min(by_stride) * factor}, "
            "or give the FPN finer levels (MODEL.FPN.IN_FEATURES, MODEL.RESNETS.OUT_FEATURES)."
        )
    return high, [by_stride[shapes[level].stride // factor] for level in high]
