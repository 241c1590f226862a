"""
The evaluator that a data set asks for, by its metadata `evaluator_type`.

COCO's and CrowdHuman's are kd_det's own; all others are Detectron2's, chosen as its
tools/train_net.py chooses them (and, for Cityscapes' panoptic sets, its project Panoptic-DeepLab).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

# (config, data set, folder for files) -> evaluator
_Build = Callable[[CfgNode, str, str], DatasetEvaluator]


def _coco(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    from kd_det.evaluation.coco import COCODetectionEvaluator

    switches = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return COCODetectionEvaluator(
        name,
        ["bbox", *(task for task, on in switches.items() if on)],
        output_dir=folder,
        backend=cfg.TEST.COCO_BACKEND,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _crowdhuman(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    from kd_det.evaluation.crowdhuman import CrowdHumanEvaluator

    return CrowdHumanEvaluator(name, output_dir=folder, rules=cfg.TEST.CROWDHUMAN_RULES)


def _lvis(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return LVISEvaluator(name, output_dir=folder)


def _voc(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(name)


def _semantic(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


def _panoptic(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return COCOPanopticEvaluator(name, folder)


def _cityscapes_instances(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    from kd_det.evaluation.cityscapes import CityscapesInstances

    return CityscapesInstances(name, folder)


def _cityscapes_semantic(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(name)


@dataclass(frozen=True)
class _Kind:
    """What the evaluation of a type of data set is made of, and the modules that it imports."""

    parts: tuple[_Build, ...]
    modules: tuple[str, ...] = ()


_KINDS = {
    "coco": _Kind((_coco,)),
    "crowdhuman": _Kind((_crowdhuman,)),
    "lvis": _Kind((_lvis,), ("lvis",)),
    "pascal_voc": _Kind((_voc,)),
    "sem_seg": _Kind((_semantic,)),
    "coco_panoptic_seg": _Kind((_semantic, _coco, _panoptic), ("panopticapi",)),
    "cityscapes_instance": _Kind((_cityscapes_instances,), ("cityscapesscripts",)),
    "cityscapes_sem_seg": _Kind((_cityscapes_semantic,), ("cityscapesscripts",)),
    "cityscapes_panoptic_seg": _Kind(
        (_panoptic, _cityscapes_semantic, _cityscapes_instances),
        ("panopticapi", "cityscapesscripts"),
    ),
}
SUPPORTED = tuple(_KINDS)
# How to get the module of that name.
_PACKAGES = {
    "lvis": "pip install lvis",
    "panopticapi": "pip install git+https://github.com/cocodataset/panopticapi.git",
    "cityscapesscripts": "pip install cityscapesscripts",
}


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """
    Build the evaluator named by the data set's metadata `evaluator_type`.

    Args:
        cfg: reads TEST.COCO_BACKEND, TEST.CROWDHUMAN_RULES, TEST.KEYPOINT_OKS_SIGMAS,
            MODEL.MASK_ON, MODEL.KEYPOINT_ON.
        dataset_name: registered name.
        output_folder: where the evaluator saves predictions.

    Raises:
        ValueError: the data set has no evaluator_type, or one that is not in SUPPORTED; or the
            evaluator does not know the value of a key.
        ImportError: the evaluator needs a package that is not installed.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    kind = _KINDS.get(evaluator_type)
    if kind is None:
        raise ValueError(
            f"data set {dataset_name!r} has evaluator_type {evaluator_type!r}; kd_det evaluates "
            f"{list(SUPPORTED)}. Data in COCO format gets one by being listed under KD.DATASETS; "
            "for any other, override `build_evaluator` of the trainer (a copy of train_net.py has "
            "one), or leave DATASETS.TEST empty"
        )
    # Detectron2's evaluators import them when training is done.
    for module in kind.modules:
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"Evaluating on {dataset_name!r} (evaluator_type {evaluator_type!r}) needs the "
                f"package {module}, which is not installed: run `{_PACKAGES[module]}`, or leave "
                "DATASETS.TEST empty to train without evaluating"
            )
    parts = [build(cfg, dataset_name, output_folder) for build in kind.parts]
    return parts[0] if len(parts) == 1 else DatasetEvaluators(parts)
