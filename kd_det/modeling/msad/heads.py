"""
The part of a detector behind its backbone, run on pyramids from elsewhere.

The branches of an aligned detector share their targets: same grids, same anchors, same ground
truth. That holds for detectors whose assignment reads nothing else, and not for those that assign
by their predictions. A dense detector says so with a class attribute,

    assigns_from_anchors: ClassVar[bool] = True

for its own `label_anchors(anchors, gt_instances)` and `forward_training`; a subclass that overrides
one of the two says it again. Detectron2's RetinaNet and FCOS, which cannot say it, are known here.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

_ASSIGN_FROM_ANCHORS = (RetinaNet, FCOS)


class Heads(Protocol):
    """What a detector does with a pyramid."""

    def levels(self) -> set[str]:
        """Names of the pyramid levels it reads."""

    def num_classes(self) -> int:
        """Number of object classes, background not counted."""

    def losses(
        self, images: ImageList, pyramid: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Detection losses of a pyramid; `images` give the sizes, in the frame of the targets."""

    def detections(self, images: ImageList, pyramid: dict[str, Tensor]) -> list[Instances]:
        """One result per image, in the frame of `images`."""

    def same_targets(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `losses` is called for the same grids and targets; what is equal is kept."""


class DenseHeads:
    """Heads of RetinaNet, FCOS, ATSS, GFL and every other `DenseDetector`."""

    def __init__(self, detector: DenseDetector) -> None:
        if not assigns_from_anchors(type(detector)):
            name = type(detector).__name__
            raise TypeError(
                f"MODEL.ALIGNED.META_ARCHITECTURE names a {name}, which does not say that it "
                "assigns ground truth by its anchors alone. The branches share one assignment; if "
                f"{name}.label_anchors reads no predictions, give the class the attribute "
                "assigns_from_anchors = True, else choose another detector."
            )
        self._detector = detector

    def levels(self) -> set[str]:
        """See `Heads`."""
        return set(self._detector.head_in_features)

    def num_classes(self) -> int:
        """See `Heads`."""
        return int(self._detector.num_classes)

    def losses(
        self, images: ImageList, pyramid: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """See `Heads`."""
        features = [pyramid[level] for level in self._detector.head_in_features]
        predictions = self._detector.head(features)
        return self._detector.forward_training(images, features, predictions, targets)

    def detections(self, images: ImageList, pyramid: dict[str, Tensor]) -> list[Instances]:
        """See `Heads`."""
        features = [pyramid[level] for level in self._detector.head_in_features]
        return self._detector.forward_inference(images, features, self._detector.head(features))

    @contextlib.contextmanager
    def same_targets(self) -> Iterator[None]:
        """
        Match anchors once, and move the running loss normaliser once.

        Without this, three passes over the same positives would move the normaliser with an
        effective momentum of 0.9 ** 3, and each branch's losses would have another divisor.
        """
        with (
            _remembered(self._detector, "label_anchors", _same_targets),
            _remembered(self._detector, "_ema_update", _same_average),
        ):
            yield


class TwoStageHeads:
    """Heads of Faster, Mask, Keypoint and Cascade R-CNN."""

    def __init__(self, detector: GeneralizedRCNN) -> None:
        if detector.proposal_generator is None:
            raise ValueError(
                "An aligned detector needs its own proposals, found MODEL.PROPOSAL_GENERATOR.NAME "
                "'PrecomputedProposals'; choose 'RPN'."
            )
        if not isinstance(detector.proposal_generator, RPN):
            raise TypeError(
                f"MODEL.PROPOSAL_GENERATOR.NAME is {type(detector.proposal_generator).__name__}, "
                "but the branches of an aligned detector share the anchors that an RPN samples; "
                "choose 'RPN'."
            )
        self._detector = detector

    def levels(self) -> set[str]:
        """See `Heads`."""
        heads = self._detector.roi_heads
        optional = ("mask_in_features", "keypoint_in_features")
        found = [*self._detector.proposal_generator.in_features, *heads.in_features]
        return set(found).union(*(getattr(heads, name, None) or () for name in optional))

    def num_classes(self) -> int:
        """See `Heads`."""
        return int(self._detector.roi_heads.num_classes)

    def losses(
        self, images: ImageList, pyramid: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """See `Heads`."""
        proposals, losses = self._detector.proposal_generator(images, pyramid, targets)
        _, roi_losses = self._detector.roi_heads(images, pyramid, proposals, targets)
        return {**losses, **roi_losses}

    def detections(self, images: ImageList, pyramid: dict[str, Tensor]) -> list[Instances]:
        """See `Heads`."""
        proposals, _ = self._detector.proposal_generator(images, pyramid, None)
        results, _ = self._detector.roi_heads(images, pyramid, proposals, None)
        return results

    @contextlib.contextmanager
    def same_targets(self) -> Iterator[None]:
        """Match and sample the anchors of the region proposal network once."""
        proposals = self._detector.proposal_generator
        with _remembered(proposals, "label_and_sample_anchors", _same_targets):
            yield


def heads_of(detector: nn.Module) -> Heads:
    """
    Return the heads of a detector.

    Raises:
        TypeError: neither a `DenseDetector` nor a `GeneralizedRCNN`, or a subclass that does more.
    """
    for kind, heads in ((DenseDetector, DenseHeads), (GeneralizedRCNN, TwoStageHeads)):
        # One with a forward pass of its own (PanopticFPN) has losses that the heads do not know.
        if isinstance(detector, kind) and type(detector).forward is kind.forward:
            return heads(detector)
    raise TypeError(
        f"MODEL.ALIGNED.META_ARCHITECTURE names a {type(detector).__name__}; an aligned detector "
        "wraps a DenseDetector (RetinaNet, FCOS, ATSS, GFL) or a GeneralizedRCNN with their own "
        "forward pass."
    )


def assigns_from_anchors(detector: type[nn.Module]) -> bool:
    """
    Tell whether a dense detector declares that it assigns by its anchors alone.

    A declaration is void for a subclass with a `label_anchors`, `losses_of_batch` (of kd_det's own
    detectors) or `forward_training` of its own.
    """
    for cls in detector.__mro__:
        known = cls in _ASSIGN_FROM_ANCHORS
        if not known and "assigns_from_anchors" not in vars(cls):
            continue
        methods = ("label_anchors", "losses_of_batch", "forward_training")
        unchanged = all(
            getattr(detector, name, None) is getattr(cls, name, None) for name in methods
        )
        return unchanged and (known or bool(vars(cls)["assigns_from_anchors"]))
    return False


def _same_targets(anchors: list[Boxes], gt_instances: list[Instances]) -> Hashable:
    """Grids of the same sizes and the same ground truth objects."""
    return tuple(len(level) for level in anchors), tuple(map(id, gt_instances))


def _same_average(name: str, *args: Any, **kwargs: Any) -> Hashable:
    """The moving average of that name."""
    return name


@contextlib.contextmanager
def _remembered(owner: nn.Module, method: str, key: Callable[..., Hashable]) -> Iterator[None]:
    """Inside, calls of a method of `owner` with equal keys return what the first one returned."""
    compute: Callable[..., Any] = getattr(owner, method)
    results: dict[Hashable, Any] = {}

    @functools.wraps(compute)
    def first_result(*args: Any, **kwargs: Any) -> Any:
        name = key(*args, **kwargs)
        if name not in results:
            results[name] = compute(*args, **kwargs)
        return results[name]

    # On the instance, in front of the class's method and of what another caller put there.
    before = vars(owner).get(method)
    vars(owner)[method] = first_result
    try:
        yield
    finally:
        del vars(owner)[method]
        if before is not None:
            vars(owner)[method] = before
