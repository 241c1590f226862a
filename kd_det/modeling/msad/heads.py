"""The part of a detector behind its backbone, run on pyramids from elsewhere."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn


class Heads(Protocol):
    """What a detector does with a pyramid."""

    def levels(self) -> set[str]:
        """Names of the pyramid levels it reads."""

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
        self._detector = detector

    def levels(self) -> set[str]:
        """See `Heads`."""
        return set(self._detector.head_in_features)

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
        with _once(self._detector, "label_anchors"), _once(self._detector, "_ema_update"):
            yield


class TwoStageHeads:
    """Heads of Faster, Mask, Keypoint and Cascade R-CNN."""

    def __init__(self, detector: GeneralizedRCNN) -> None:
        if detector.proposal_generator is None:
            raise ValueError(
                "An aligned detector needs its own proposals, found MODEL.PROPOSAL_GENERATOR.NAME "
                "'PrecomputedProposals'; choose 'RPN'."
            )
        self._detector = detector

    def levels(self) -> set[str]:
        """See `Heads`."""
        heads = self._detector.roi_heads
        optional = ("mask_in_features", "keypoint_in_features")
        found = [*self._detector.proposal_generator.in_features, *heads.in_features]
        return set(found).union(*(getattr(heads, name, None) or () for name in optional))

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
        with _once(self._detector.proposal_generator, "label_and_sample_anchors"):
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


@contextlib.contextmanager
def _once(owner: nn.Module, method: str) -> Iterator[None]:
    """
    Inside, the first result of a method of `owner` is the result of its later calls, too.

    A method whose first argument is a string, a name, has one result per name.
    """
    compute: Callable[..., Any] = getattr(owner, method)
    results: dict[str, Any] = {}

    @functools.wraps(compute)
    def first_result(*args: Any, **kwargs: Any) -> Any:
        name = args[0] if args and isinstance(args[0], str) else ""
        if name not in results:
            results[name] = compute(*args, **kwargs)
        return results[name]

    # On the instance, in front of the class's method.
    owner.__dict__[method] = first_result
    try:
        yield
    finally:
        del owner.__dict__[method]
