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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.functional.resize import INTERPOLATIONS, reduce_image
from kd_det.modeling.msad.fpn import LevelSelectingFPN, paired_levels
from kd_det.modeling.msad.fusion import build_fusion
from kd_det.modeling.msad.heads import heads_of
from kd_det.modeling.msad.split_bn import split_statistics, state_of, statistics_of
from kd_det.modeling.options import add_keys, defaults_of, read_options
from kd_det.modeling.registering import register_in

BRANCHES = ("high", "low", "fused")


@dataclass(frozen=True, kw_only=True)
class AlignedOptions:
    """
    Keys of MODEL.ALIGNED: AlignedMultiScaleDetector, MSAD's teacher (CVPR 2021).

    The wrapped detector's IN_FEATURES name the full view's levels (p3..p7 at FACTOR 2, RPN's and
    ROI_HEADS' too); the FPN must also have those that the reduced view needs (p2..p6).

    Raises:
        ValueError: an option out of its range.
    """

    # The wrapped detector, built from this same config: a dense detector or GeneralizedRCNN.
    meta_architecture: str = "FCOS"
    # Sides of the reduced view are the full view's divided by this; a power of two, MSAD: 2. At 4 a
    # ResNet's full view starts at p4.
    factor: int = 2
    # How the reduced view is computed from the normalised, padded batch: "nearest" (MSAD's code:
    # pixels 0, 2, 4, ...), "bilinear" (antialiased) or "area".
    interpolation: str = "nearest"
    # Blend of the two pyramids: "cff" (MSAD's crossing feature-level fusion) or "mean".
    fusion: str = "cff"
    # Input units of cff's gate per hidden unit (MSAD: 16).
    fusion_reduction: int = 16
    # Weights of the detection losses of the branches high, low and fused (MSAD: 1, 1, 0.4).
    loss_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 0.4])
    # Branch whose detections evaluation returns: "fused" (as published), "high" or "low". The
    # latter two run one view alone.
    eval_branch: str = "fused"
    # BatchNorm keeps running statistics per branch, affine parameters shared. MSAD shares both, so
    # that evaluation uses a blend of the statistics of two resolutions.
    split_bn: bool = False
    # Leave the padded area of batched images out of cff's pooling (MSAD pools over all of it).
    mask_padding: bool = False

    def __post_init__(self) -> None:
        weights = list(self.loss_weights)
        if self.eval_branch not in BRANCHES or len(weights) != len(BRANCHES):
            raise ValueError(
                f"The branches are {', '.join(BRANCHES)}; found MODEL.ALIGNED.EVAL_BRANCH "
                f"{self.eval_branch!r} and LOSS_WEIGHTS {weights}."
            )
        if any(not isinstance(w, (int, float)) or w < 0 for w in weights) or not sum(weights):
            raise ValueError(
                f"MODEL.ALIGNED.LOSS_WEIGHTS is {weights}; expected numbers >= 0, at least one of "
                "them above."
            )
        if self.mask_padding and self.fusion != "cff":
            raise ValueError(
                f"MODEL.ALIGNED.MASK_PADDING is True, but FUSION {self.fusion!r} pools nothing; "
                "set it False, or FUSION to 'cff'."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"MODEL.ALIGNED.INTERPOLATION is {self.interpolation!r}; choose one of "
                f"{', '.join(INTERPOLATIONS)}."
            )


@register_in(META_ARCH_REGISTRY)
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
        self, *, detector: DenseDetector | GeneralizedRCNN, options: AlignedOptions
    ) -> None:
        """
        Wrap a detector.

        Args:
            detector: with an FPN; changed in place.
            options: as the keys of MODEL.ALIGNED, which say what each is.

        Raises:
            ValueError: an option out of its range, or a level that the FPN lacks.
            TypeError: a detector or a backbone of another kind.
        """
        super().__init__()
        self._heads = heads_of(detector)
        fpn = detector.backbone
        shapes = fpn.output_shape()
        high, low = paired_levels(shapes, self._heads.levels(), options.factor)
        # Sides that are a multiple of the FPN's own divisor after the reduction, too.
        detector.backbone = LevelSelectingFPN(fpn, fpn.size_divisibility * options.factor)
        self.detector = detector
        self.fusion = build_fusion(
            options.fusion, shapes[high[0]].channels, options.fusion_reduction
        )
        self.branch_levels = {"high": high, "low": low}
        self.strides = [shapes[level].stride for level in high]
        self.factor = options.factor
        self.interpolation = options.interpolation
        self.loss_weights = dict(zip(BRANCHES, options.loss_weights, strict=True))
        self.eval_branch = options.eval_branch
        self.mask_padding = options.mask_padding
        if options.split_bn:
            self._split_bn()

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add MODEL.ALIGNED."""
        add_keys(cfg.MODEL, "ALIGNED", defaults_of(AlignedOptions))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the wrapped detector from the same config, by its own name."""
        options = read_options(AlignedOptions, cfg.MODEL.ALIGNED)
        if options.meta_architecture == cls.__name__:
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
        detector = META_ARCH_REGISTRY.get(options.meta_architecture)(cfg)
        return {"detector": detector, "options": options}

    @property
    def num_classes(self) -> int:
        """Object classes of the wrapped detector, background not counted."""
        return self._heads.num_classes()

    def expected_view(self) -> tuple[float, str]:
        """
        Say which view a student of this teacher should see.

        Returns:
            The factor by which the sides of the image are divided, and the interpolation: those of
            the reduced view that the low branch learned on.
        """
        return float(self.factor), self.interpolation

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
            maps["fused"] = self.fusion(maps["high"], maps["low"], self.strides, sizes)
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
