"""The keys that ATSS and GFL share."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class SingleAnchorOptions:
    """
    Keys of the detectors with one square anchor per position and the assignment of ATSS.

    Raises:
        ValueError: a count below 1, or an anchor without size.
    """

    # The keys are MODEL.<node>.*.
    node: ClassVar[str]

    # Object classes, background not counted.
    num_classes: int = 80
    # Pyramid levels, finest first.
    in_features: list[str] = field(default_factory=lambda: ["p3", "p4", "p5", "p6", "p7"])
    # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
    num_convs: int = 4
    # Norm in the towers: "GN" (groups: gcd(32, width)), "BN"/"SyncBN" (statistics per level) or "".
    norm: str = "GN"
    # Class probability every position starts with.
    prior_prob: float = 0.01
    # Side of the anchors in strides of their level. Their centres: MODEL.ANCHOR_GENERATOR.OFFSET
    # strides from the corner of the image; SIZES and ASPECT_RATIOS there have no effect.
    anchor_scale: float = 8.0
    # Candidates of each object on each level, nearest centres first (ATSS, CVPR 2020: 9).
    topk: int = 9
    # Factor of the GIoU loss.
    bbox_loss_weight: float = 2.0
    # Detections of a class probability below this are dropped.
    score_thresh_test: float = 0.05
    # Candidates each level may send to non-maximum suppression.
    topk_candidates_test: int = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    nms_thresh_test: float = 0.6

    def __post_init__(self) -> None:
        self._expect_counts("num_convs", "topk")
        if self.anchor_scale <= 0:
            raise ValueError(
                f"MODEL.{self.node}.ANCHOR_SCALE is {self.anchor_scale}, expected above 0."
            )

    def _expect_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                key = f"MODEL.{self.node}.{name.upper()}"
                raise ValueError(f"{key} is {getattr(self, name)}, expected at least 1.")

    def box_outputs(self) -> int:
        """Return how many numbers describe the box of a position."""
        return 4
