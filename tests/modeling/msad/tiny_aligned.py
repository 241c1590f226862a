"""Narrow detectors, a batch and comparisons for the tests of aligned detectors."""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import nn

import kd_det.modeling  # noqa: F401
from kd_det.config import add_kd_config

DENSE = ["FCOS", "RetinaNet", "ATSS", "GFL"]
DETECTORS = [*DENSE, "Faster", "Mask", "Keypoint"]
HIGH = ["p3", "p4", "p5", "p6", "p7"]
LOW = ["p2", "p3", "p4", "p5", "p6"]


def detector_cfg(name: str, levels: list[str]) -> CfgNode:
    """A narrow detector whose heads read `levels`; anchors scale with the finest stride."""
    cfg = get_cfg()
    add_kd_config(cfg)
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.BACKBONE.NAME = "build_fpn_backbone"
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = 18
    model.RESNETS.NORM = "GN"
    model.PIXEL_STD = [60.0, 60.0, 60.0]
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 8
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = 16
    model.META_ARCHITECTURE = name if name in DENSE else "GeneralizedRCNN"
    for key in ("RPN", "ROI_HEADS"):
        model[key].IN_FEATURES = levels
    for key in (name.upper() for name in DENSE):
        model[key].IN_FEATURES = levels
        model[key].NUM_CLASSES = 3
        # A group of one channel has no statistics on a 1x1 map.
        model[key].NORM = ""
        model[key].NUM_CONVS = 1
        model[key].SCORE_THRESH_TEST = 0.0
    model.FPN.TOP_BLOCK = "p6_c5" if levels[-1] == "p6" else "p6p7_c5"
    scale = 2 ** (int(levels[0][1]) - 3)
    model.ANCHOR_GENERATOR.SIZES = [[32 * scale * 2**i] for i in range(len(levels))]
    roi = model.ROI_HEADS
    model.ROI_HEADS.NAME = "StandardROIHeads"
    roi.NUM_CLASSES, roi.BATCH_SIZE_PER_IMAGE, roi.SCORE_THRESH_TEST = 3, 16, 0.0
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TRAIN = 50
    model.RPN.PRE_NMS_TOPK_TEST = model.RPN.POST_NMS_TOPK_TEST = 50
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_BOX_HEAD.POOLER_RESOLUTION = 32, 3
    model.MASK_ON = name == "Mask"
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.KEYPOINT_ON = name == "Keypoint"
    model.ROI_KEYPOINT_HEAD.CONV_DIMS, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = [8], 4
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def aligned(name: str, norm: str = "GN", **options: Any) -> nn.Module:
    """An aligned detector around `detector_cfg(name, HIGH)`."""
    cfg = detector_cfg(name, HIGH)
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RETINANET.NORM = "BN" if norm == "BN" else ""
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    for key, value in options.items():
        cfg.MODEL.ALIGNED[key] = value
    return build_model(cfg)


def instances(height: int, width: int, boxes: list[list[float]]) -> Instances:
    """Ground truth with masks and four visible keypoints inside each box."""
    tensor = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    points = torch.zeros(len(boxes), 4, 3)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        masks[i, int(y0) : int(y1), int(x0) : int(x1)] = True
        corners = [(x0, y0), (x1, y0), (x0, y1), (x1, y1)]
        points[i] = torch.tensor([[0.9 * x + 2, 0.9 * y + 2, 2] for x, y in corners])
    return Instances(
        (height, width),
        gt_boxes=Boxes(tensor),
        gt_classes=torch.arange(len(boxes)) % 3,
        gt_masks=BitMasks(masks),
        gt_keypoints=Keypoints(points),
    )


def batch(empty: bool = False) -> list[dict[str, Any]]:
    """Two images of different sizes, neither a multiple of 64."""
    sizes = [(61, 100), (80, 57)]
    boxes = [[[4.0, 6.0, 30.0, 50.0], [50.0, 20.0, 90.0, 55.0]], [[10.0, 12.0, 50.0, 70.0]]]
    return [
        {
            "image": torch.rand(3, h, w) * 255,
            "height": 2 * h,
            "width": 2 * w,
            "instances": instances(h, w, [] if empty else found),
        }
        for (h, w), found in zip(sizes, boxes, strict=True)
    ]


def assert_same_detections(found: Instances, expected: Instances, atol: float = 1e-3) -> None:
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=atol, rtol=1e-5
    )
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()
