"""The settings of Detectron2's own configs, at tiny size: what each changes of the defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
import zoo_data

_TINY: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "INPUT.MIN_SIZE_TRAIN": [0],
    "INPUT.MIN_SIZE_TEST": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.STEPS": [],
    "SOLVER.MAX_ITER": 2,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "SEED": 7,
}
_C4: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16, 32]],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
}
_DC5 = {
    **_C4,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RPN.IN_FEATURES": ["res5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
}
_FPN: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
}
_MASK = {**_FPN, "MODEL.MASK_ON": True}
_RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[s, s * 1.26] for s in (8, 16, 32, 64, 128)],
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.NUM_CONVS": 1,
}


def _normed(name: str) -> dict[str, Any]:
    """A norm in every part, as the configs with GN and SyncBN have it."""
    return {
        **_MASK,
        "MODEL.RESNETS.NORM": name,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
        "MODEL.FPN.NORM": name,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.NORM": name,
        "MODEL.ROI_MASK_HEAD.NORM": name,
    }


@dataclass(frozen=True)
class Setting:
    """
    One of Detectron2's configs.

    Attributes:
        keys: what it changes.
        data: makes its data in a folder; returns the name.
        tasks: of the metrics that its evaluation gives.
        modules: packages that the evaluation needs.
        loads: whether already reading the data needs them.
    """

    keys: dict[str, Any]
    data: Callable[[Path], str] = zoo_data.coco
    tasks: frozenset[str] = frozenset({"bbox"})
    modules: tuple[str, ...] = ()
    loads: bool = field(default=False)


_SEGM = frozenset({"bbox", "segm"})
_SEMANTIC = {**_FPN, "MODEL.META_ARCHITECTURE": "SemanticSegmentor"}

SETTINGS = {
    "faster_rcnn_C4": Setting(_C4),
    "mask_rcnn_C4": Setting({**_C4, "MODEL.MASK_ON": True}, tasks=_SEGM),
    "faster_rcnn_DC5": Setting(_DC5),
    "faster_rcnn_FPN": Setting(_FPN),
    "retinanet_FPN": Setting(_RETINANET),
    "mask_rcnn_FPN": Setting(_MASK, tasks=_SEGM),
    "keypoint_rcnn_FPN": Setting(
        {**_FPN, "MODEL.KEYPOINT_ON": True, "TEST.KEYPOINT_OKS_SIGMAS": [0.1] * 3},
        tasks=frozenset({"bbox", "keypoints"}),
    ),
    "cascade_mask_rcnn_FPN": Setting(
        {
            **_MASK,
            "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        },
        tasks=_SEGM,
    ),
    "mask_rcnn_FPN_gn": Setting(_normed("GN"), tasks=_SEGM),
    "mask_rcnn_FPN_syncbn": Setting(
        {
            **_normed("SyncBN"),
            "TEST.PRECISE_BN.ENABLED": True,
            "TEST.PRECISE_BN.NUM_ITER": 2,
            "TEST.EVAL_PERIOD": 1,
        },
        tasks=_SEGM,
    ),
    "rpn_C4": Setting(
        {**_C4, "MODEL.META_ARCHITECTURE": "ProposalNetwork"}, tasks=frozenset({"box_proposals"})
    ),
    "rpn_FPN": Setting(
        {**_FPN, "MODEL.META_ARCHITECTURE": "ProposalNetwork"}, tasks=frozenset({"box_proposals"})
    ),
    "panoptic_FPN": Setting(
        {
            **_MASK,
            "MODEL.META_ARCHITECTURE": "PanopticFPN",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0.5,
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        },
        data=zoo_data.panoptic,
        tasks=frozenset({"bbox", "segm", "sem_seg", "panoptic_seg"}),
        modules=("panopticapi",),
    ),
    "semantic_FPN": Setting(
        {**_SEMANTIC, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2},
        data=zoo_data.semantic,
        tasks=frozenset({"sem_seg"}),
    ),
    "lvis_mask_rcnn_FPN": Setting(
        {
            **_MASK,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0001,
            "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            "DATALOADER.REPEAT_THRESHOLD": 0.001,
        },
        data=zoo_data.lvis,
        tasks=_SEGM,
        modules=("lvis",),
        loads=True,
    ),
    "cityscapes_mask_rcnn_FPN": Setting(
        {**_MASK, "MODEL.ROI_HEADS.NUM_CLASSES": 8, "INPUT.MASK_FORMAT": "bitmask"},
        data=zoo_data.cityscapes,
        tasks=frozenset({"segm"}),
        modules=("cityscapesscripts",),
        loads=True,
    ),
    "cityscapes_semantic_FPN": Setting(
        {**_SEMANTIC, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19},
        data=zoo_data.cityscapes_semantic,
        tasks=frozenset({"sem_seg"}),
        modules=("cityscapesscripts",),
    ),
    "voc_faster_rcnn_C4": Setting(_C4, data=zoo_data.voc),
    # A project of Detectron2's, through the plugin door.
    "pointrend_FPN": Setting(
        {
            **_MASK,
            "KD.PLUGINS": ["detectron2.projects.point_rend:add_pointrend_config"],
            "MODEL.ROI_MASK_HEAD.NAME": "PointRendMaskHead",
            "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": True,
            "MODEL.ROI_MASK_HEAD.FC_DIM": 32,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "",
            "INPUT.MASK_FORMAT": "bitmask",
            "MODEL.POINT_HEAD.NUM_CLASSES": 2,
            "MODEL.POINT_HEAD.FC_DIM": 16,
        },
        tasks=_SEGM,
        modules=("detectron2.projects.point_rend",),
        loads=True,
    ),
}
# As a teacher alone: training it needs a GPU and Detectron2 compiled.
TEACHERS = {
    **SETTINGS,
    "mask_rcnn_FPN_dconv": Setting(
        {**_MASK, "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}
    ),
}


def write(path: Path, keys: dict[str, Any], **more: Any) -> Path:
    """Write a tiny config with a setting's keys, and others on top."""
    content: dict[str, Any] = {}
    flat = {**_TINY, "OUTPUT_DIR": str(path.with_suffix("")), **keys, **more}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path.write_text(yaml.safe_dump(content))
    return path


def distilled(keys: dict[str, Any], teacher: Path, weights: Path) -> dict[str, Any]:
    """Return the keys of a setting's model as a student."""
    return {
        **keys,
        "MODEL.META_ARCHITECTURE": "DistillationDetector",
        "KD.STUDENT.META_ARCHITECTURE": keys["MODEL.META_ARCHITECTURE"],
        "KD.DISTILLERS": ["FeatureLp"],
        "KD.TEACHER.CONFIG_FILE": str(teacher),
        "KD.TEACHER.WEIGHTS": str(weights),
    }
