"""An FPN that computes only the wanted levels, for detectors that see several resolutions."""

from collections.abc import Sequence

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
        self._average = fpn._fuse_type == "avg"
        names = list(self._shape)
        self._laterals = dict(zip(names, fpn.in_features, strict=False))
        self._extras = names[len(self._laterals) :]

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
        remaining = needed & set(self._laterals)
        path: Tensor | None = None
        for level, feature in reversed(self._laterals.items()):
            if not remaining:
                break
            lateral = self.get_submodule(f"fpn_lateral{level[1:]}")(bottom_up[feature])
            if path is None:
                path = lateral
            else:
                path = lateral + F.interpolate(path, scale_factor=2.0, mode="nearest")
                path = path / 2 if self._average else path
            if level in remaining:
                results[level] = self.get_submodule(f"fpn_output{level[1:]}")(path)
                remaining.remove(level)
        return results

    def _extra(self, source: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return levels of the top block; it computes all of its own, save where p6 is enough."""
        if isinstance(self.top_block, LastLevelP6P7) and list(wanted) == self._extras[:1]:
            return {self._extras[0]: self.top_block.p6(source)}
        return dict(zip(self._extras, self.top_block(source), strict=True))
