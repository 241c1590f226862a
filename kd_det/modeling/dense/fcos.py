"""
FCOS (Tian et al., ICCV 2019 and TPAMI 2020) buildable from yaml.

Detectron2 has the detector but offers it to Python configs alone. This subclass reads MODEL.FCOS,
is registered as meta-architecture "FCOS", and trains on images without any ground-truth box, which
Detectron2 0.6 cannot match. Everything else, losses and parameter names included, is Detectron2's.
"""

from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, Instances

from kd_det.functional.precision import at_least_float32
from kd_det.modeling.backbones.fpn import pick_features
from kd_det.modeling.norms import head_norm
from kd_det.modeling.options import add_keys
from kd_det.modeling.registering import register_in


@register_in(META_ARCH_REGISTRY)
class FCOS(detectron2_fcos.FCOS):
    """Detectron2's FCOS with a `from_config`; its arguments are those of Detectron2's class."""

    # See `kd_det.modeling.msad.heads`.
    assigns_from_anchors: ClassVar[bool] = True

    __init__ = configurable(detectron2_fcos.FCOS.__init__)

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add MODEL.FCOS. Defaults are those of Detectron2's class and its 1x config."""
        keys: dict[str, Any] = {}
        # Object classes, background not counted.
        keys["NUM_CLASSES"] = 80
        # Pyramid levels, finest first. An object belongs to the level of stride s where the longest
        # distance from the position to its sides is 4s to 8s; first and last level are open-ended.
        keys["IN_FEATURES"] = ["p3", "p4", "p5", "p6", "p7"]
        # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
        keys["NUM_CONVS"] = 4
        # Norm in the towers: "GN" (gcd(32, width) groups), "BN" or "SyncBN" (statistics per level),
        # "".
        keys["NORM"] = "GN"
        # Positions closer to a box's centre than this many strides, in x and y, may be positive.
        keys["CENTER_SAMPLING_RADIUS"] = 1.5
        # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
        keys["FOCAL_LOSS_ALPHA"] = 0.25
        keys["FOCAL_LOSS_GAMMA"] = 2.0
        # Class probability every position starts with.
        keys["PRIOR_PROB"] = 0.01
        # Distance in strides from a position to each side of its box that training starts with.
        # Detectron2's is 0, where the ReLU of its boxes may die: from random weights give 2.
        keys["BOX_BIAS"] = 0.0
        # Detections below this score are dropped. The score is sqrt(class * centerness), so 0.2
        # means the product 0.04.
        keys["SCORE_THRESH_TEST"] = 0.2
        # Candidates each level may send to non-maximum suppression.
        keys["TOPK_CANDIDATES_TEST"] = 1000
        # IoU above which non-maximum suppression drops the lower-scored box of a class.
        keys["NMS_THRESH_TEST"] = 0.6
        add_keys(cfg.MODEL, "FCOS", keys)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """
        Read the arguments of `__init__` from a config.

        Raises:
            ValueError: a level of MODEL.FCOS.IN_FEATURES that the backbone lacks, or no tower.
        """
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        input_shape = pick_features(backbone, fcos.IN_FEATURES, "MODEL.FCOS.IN_FEATURES")
        if fcos.NUM_CONVS < 1:
            raise ValueError(
                f"MODEL.FCOS.NUM_CONVS is {fcos.NUM_CONVS}; the towers need at least 1 convolution."
            )
        head = detectron2_fcos.FCOSHead(
            input_shape=input_shape,
            num_classes=fcos.NUM_CLASSES,
            conv_dims=[input_shape[0].channels] * fcos.NUM_CONVS,
            norm=head_norm(fcos.NORM),
            prior_prob=fcos.PRIOR_PROB,
        )
        torch.nn.init.constant_(head.bbox_pred.bias, fcos.BOX_BIAS)
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[Any],
        pred_centerness: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        Compute Detectron2's losses of lists with one entry per level, also with mixed precision.

        Detectron2 0.6 decodes boxes in the type of `pred_anchor_deltas`, (N, R, 4), and its GIoU
        loss fails on half precision.
        """
        deltas = [at_least_float32(x) for x in pred_anchor_deltas]
        out: dict[str, torch.Tensor] = super().losses(
            anchors, pred_logits, gt_labels, deltas, gt_boxes, pred_centerness
        )
        return out

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[Any]]:
        """
        Assign ground truth to positions; in an image without boxes all positions are background.

        Args:
            anchors: one `Boxes` per level, R positions in all.
            gt_instances: per image, with `gt_boxes` (M, 4) and `gt_classes` (M,); M may be 0.

        Returns:
            Per image the labels (R,), MODEL.FCOS.NUM_CLASSES meaning background, and the matched
            boxes as Detectron2's `losses` wants them: `Boxes` at v0.6, tensors (R, 4) later.
        """
        labels, boxes = super().label_anchors(
            anchors, [x if len(x) else _with_unmatchable_box(x) for x in gt_instances]
        )
        return labels, boxes


def _with_unmatchable_box(empty: Instances) -> Instances:
    """Give an image without ground truth one box of no area: no position lies inside it."""
    return Instances(
        empty.image_size,
        gt_boxes=Boxes(empty.gt_boxes.tensor.new_zeros(1, 4)),
        gt_classes=empty.gt_classes.new_zeros(1),
    )
