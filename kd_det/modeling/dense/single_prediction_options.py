"""The keys that all detectors with one prediction per position share."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class SinglePredictionOptions:
    """
    Keys of the detectors with one prediction per position.

    Raises:
        ValueError: a count below 1.
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
    # Detections of a class probability below this are dropped.
    score_thresh_test: float = 0.05
    # Candidates each level may send to non-maximum suppression.
    topk_candidates_test: int = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    nms_thresh_test: float = 0.6

    def __post_init__(self) -> None:
        self._expect_counts("num_convs")

    def _expect_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                key = f"MODEL.{self.node}.{name.upper()}"
                raise ValueError(f"{key} is {getattr(self, name)}, expected at least 1.")

    def anchor_side(self) -> float:
        """Return the side of the square at each position in strides; 1 where none is needed."""
        return 1.0

    def box_outputs(self) -> int:
        """Return how many numbers describe the box of a position."""
        return 4
