"""The keys that ATSS and GFL share."""

from dataclasses import dataclass

from kd_det.modeling.dense.single_prediction_options import SinglePredictionOptions


@dataclass(frozen=True, kw_only=True)
class SingleAnchorOptions(SinglePredictionOptions):
    """
    Keys of the detectors with one square anchor per position and the assignment of ATSS.

    Raises:
        ValueError: a count below 1, or an anchor without size.
    """

    # Side of the anchors in strides of their level. Their centres: MODEL.ANCHOR_GENERATOR.OFFSET
    # strides from the corner of the image; SIZES and ASPECT_RATIOS there have no effect.
    anchor_scale: float = 8.0
    # Candidates of each object on each level, nearest centres first (ATSS, CVPR 2020: 9).
    topk: int = 9
    # Factor of the GIoU loss.
    bbox_loss_weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_counts("topk")
        if self.anchor_scale <= 0:
            raise ValueError(
                f"MODEL.{self.node}.ANCHOR_SCALE is {self.anchor_scale}, expected above 0."
            )

    def anchor_side(self) -> float:
        """See `SinglePredictionOptions`."""
        return self.anchor_scale
