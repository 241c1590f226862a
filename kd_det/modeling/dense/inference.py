"""From the scored boxes of a dense detector to its detections."""

from dataclasses import dataclass

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor


@dataclass(frozen=True)
class InferenceSettings:
    """
    How predictions become detections.

    Args:
        score_thresh: class probability below which a prediction is dropped.
        topk_candidates: predictions kept per level before NMS.
        nms_thresh: IoU above which the lower score of one class is dropped.
        max_detections: detections kept per image.
    """

    score_thresh: float = 0.05
    topk_candidates: int = 1000
    nms_thresh: float = 0.6
    max_detections: int = 100


DEFAULT_INFERENCE = InferenceSettings()


def suppress(
    image_size: tuple[int, int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    settings: InferenceSettings,
) -> Instances:
    """
    Apply non-maximum suppression per class.

    Args:
        image_size: height and width in pixels, of the image the boxes lie in.
        boxes: (P, 4) corners in pixels.
        scores: (P,).
        classes: (P,).
        settings: the IoU threshold and the number kept.

    Returns:
        The detections, best first, with `pred_boxes`, `scores` and `pred_classes`.
    """
    keep = batched_nms(boxes, scores, classes, settings.nms_thresh)[: settings.max_detections]
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes[keep]),
        scores=scores[keep],
        pred_classes=classes[keep],
    )
