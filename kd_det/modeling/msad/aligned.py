"""
Resolution-aligned multi-scale detectors (MSAD, Qi et al., CVPR 2021, arXiv 2109.06875).

An image reduced by k = 2**m gives, m pyramid levels lower, maps of the same size as the full image.
One backbone sees both, and level p_s of the full view and p_(s-m) of the reduced one share a grid,
its strides, its anchors and its targets, all in the full image's frame. One head is trained on both
pyramids and on their blend:

    L = w_high L(D(P_high), Y) + w_low L(D(P_low), Y) + w_fused L(D(P_fused), Y),   w = (1, 1, 0.4)

The wrapped detector stays as its config builds it: its IN_FEATURES name the full view's levels,
e.g. p3..p7 (a two-stage detector's too: strides 8..128 in every branch), and its FPN must have the
reduced view's, e.g. p2..p6. A ResNet's FPN starts at p2, so with k = 4 the full view starts at p4.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.functional.resize import INTERPOLATIONS, reduce_image
from kd_det.modeling.msad.fpn import LevelSelectingFPN
from kd_det.modeling.msad.fusion import build_fusion
from kd_det.modeling.msad.heads import heads_of
from kd_det.modeling.msad.split_bn import split_statistics, state_of, statistics_of

BRANCHES = ("high", "low", "fused")


@META_ARCH_REGISTRY.register()
class AlignedMultiScaleDetector(nn.Module):
    """
    Trains a detector on the full view, the reduced view and a blend of their pyramids.

    `detector` is the wrapped detector; its `backbone` is called once per view, the full one first.
    `fusion` is called with the pyramids of both and returns the blended one, fine to coarse.
    `branch_levels` names the backbone's levels that "high" and "low" use, `strides` those of the
    common grid, in pixels of the full view.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: Any,
        factor: int,
        interpolation: str,
        fusion: str,
        fusion_reduction: int,
        loss_weights: Sequence[float],
        eval_branch: str,
        split_bn: bool,
        mask_padding: bool,
    ) -> None:
        """
        Wrap a detector.

        Args:
            detector: a `DenseDetector` or `GeneralizedRCNN` with an FPN, changed in place.
            factor: k, the reduction of the image's sides; a power of two, at least 2.
            interpolation: of the reduction: "nearest" (the authors'), "bilinear" or "area".
            fusion: "cff" or "mean".
            fusion_reduction: of the hidden layer of "cff".
            loss_weights: of the branches high, low and fused.
            eval_branch: which branch's boxes evaluation returns.
            split_bn: whether the branches have BatchNorm statistics of their own.
            mask_padding: whether padding stays out of the pooling of "cff".

        Raises:
            ValueError: an option out of its range, or a level that the FPN lacks.
            TypeError: a detector or a backbone of another kind.
        """
        super().__init__()
        if eval_branch not in BRANCHES or len(loss_weights) != len(BRANCHES):
            raise ValueError(
                f"The branches are {', '.join(BRANCHES)}; found MODEL.ALIGNED.EVAL_BRANCH "
                f"{eval_branch!r} and LOSS_WEIGHTS {list(loss_weights)}."
            )
        if any(not isinstance(w, (int, float)) or w < 0 for w in loss_weights) or not sum(
            loss_weights
        ):
            raise ValueError(
                f"MODEL.ALIGNED.LOSS_WEIGHTS is {list(loss_weights)}; expected numbers >= 0, at "
                "least one of them above."
            )
        if mask_padding and fusion != "cff":
            raise ValueError(
                f"MODEL.ALIGNED.MASK_PADDING is True, but FUSION {fusion!r} pools nothing; set it "
                "False, or FUSION to 'cff'."
            )
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"MODEL.ALIGNED.INTERPOLATION is {interpolation!r}; choose one of "
                f"{', '.join(INTERPOLATIONS)}."
            )
        self._heads = heads_of(detector)
        fpn = detector.backbone
        shapes = fpn.output_shape()
        high, low = paired_levels(shapes, self._heads.levels(), factor)
        # Sides that are a multiple of the FPN's own divisor after the reduction, too.
        detector.backbone = LevelSelectingFPN(fpn, fpn.size_divisibility * factor)
        self.detector = detector
        self.fusion = build_fusion(fusion, shapes[high[0]].channels, 2, fusion_reduction)
        self.branch_levels = {"high": high, "low": low}
        self.strides = [shapes[level].stride for level in high]
        self.factor = factor
        self.interpolation = interpolation
        self.loss_weights = dict(zip(BRANCHES, loss_weights, strict=True))
        self.eval_branch = eval_branch
        self.mask_padding = mask_padding
        if split_bn:
            self._split_bn()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the wrapped detector from the same config, by its own name."""
        options = cfg.MODEL.ALIGNED
        if options.META_ARCHITECTURE == cls.__name__:
            raise ValueError(
                f"MODEL.ALIGNED.META_ARCHITECTURE is {cls.__name__} itself; name the detector to "
                "wrap, e.g. RetinaNet."
            )
        if cfg.TEST.PRECISE_BN.ENABLED:
            raise ValueError(
                f"TEST.PRECISE_BN.ENABLED is True, but a {cls.__name__} normalises views of "
                "several resolutions in each pass, and precise statistics would be the last "
                "view's alone; set it False (MODEL.ALIGNED.SPLIT_BN gives each view its own)."
            )
        if cfg.VIS_PERIOD > 0:
            raise ValueError(
                f"VIS_PERIOD is {cfg.VIS_PERIOD}, but a {cls.__name__} draws no training images; "
                "set it 0."
            )
        return {
            "detector": META_ARCH_REGISTRY.get(options.META_ARCHITECTURE)(cfg),
            "factor": options.FACTOR,
            "interpolation": options.INTERPOLATION,
            "fusion": options.FUSION,
            "fusion_reduction": options.FUSION_REDUCTION,
            "loss_weights": options.LOSS_WEIGHTS,
            "eval_branch": options.EVAL_BRANCH,
            "split_bn": options.SPLIT_BN,
            "mask_padding": options.MASK_PADDING,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Train or evaluate on a batch in Detectron2's standard format.

        Args:
            batched_inputs: N dicts with "image" (3, H, W) as loaded, in training with "instances".

        Returns:
            In training, weighted losses named `<loss>_high`, `<loss>_low`, `<loss>_fused`. In
            evaluation, N dicts with "instances" of the evaluated branch, in the output resolution.
        """
        images = self.detector.preprocess_image(batched_inputs)
        if self.training:
            return self._losses(images, batched_inputs)
        pyramid = self._pyramids(images, (self.eval_branch,))[self.eval_branch]
        with statistics_of(self.detector, self.eval_branch):
            results = self._heads.detections(images, pyramid)
        outputs = []
        for result, item, size in zip(results, batched_inputs, images.image_sizes, strict=True):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            outputs.append({"instances": detector_postprocess(result, height, width)})
        return outputs

    def inheritable_state(self) -> dict[str, Tensor]:
        """
        Return the low branch as the state of a plain detector, for a student of the reduced view.

        Names are the wrapped detector's own, without a prefix. With SPLIT_BN the running statistics
        are the low branch's. Tensors are not copied.
        """
        return state_of(self.detector, "low")

    def _losses(self, images: ImageList, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        targets = [item["instances"].to(self.detector.device) for item in batched_inputs]
        pyramids = self._pyramids(images, BRANCHES)
        storage = get_event_storage()
        losses = {}
        with self._heads.same_targets():
            for branch, weight in self.loss_weights.items():
                with statistics_of(self.detector, branch), storage.name_scope(branch):
                    found = self._heads.losses(images, pyramids[branch], targets)
                losses.update({f"{name}_{branch}": weight * loss for name, loss in found.items()})
        return losses

    def _pyramids(self, images: ImageList, branches: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Return the pyramid of each branch under the full view's level names; run nothing else."""
        views = [view for view in ("high", "low") if view in branches or "fused" in branches]
        maps = {view: self._view(images.tensor, view) for view in views}
        if "fused" in branches:
            sizes = images.image_sizes if self.mask_padding else None
            maps["fused"] = self.fusion([maps["high"], maps["low"]], self.strides, sizes)
        names = self.branch_levels["high"]
        return {branch: dict(zip(names, maps[branch], strict=True)) for branch in branches}

    def _view(self, images: Tensor, view: str) -> list[Tensor]:
        if view == "low":
            images = reduce_image(images, self.factor, self.interpolation)
        with statistics_of(self.detector, view):
            return list(self.detector.backbone(images, self.branch_levels[view]).values())

    def _split_bn(self) -> None:
        if not split_statistics(self.detector, "low"):
            raise ValueError(
                "MODEL.ALIGNED.SPLIT_BN is on, but no layer of the detector has running statistics "
                "(FrozenBN and GN have none to split); switch it off or choose BN or SyncBN."
            )
        # The heads see the blend as well.
        for name, child in self.detector.named_children():
            if name != "backbone":
                split_statistics(child, "fused")


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
