"""The evaluator that a data set asks for."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

SUPPORTED = ("coco", "crowdhuman")


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
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco":
        from kd_det.evaluation.coco import COCODetectionEvaluator

        switches = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        return COCODetectionEvaluator(
            dataset_name,
            ["bbox", *(task for task, on in switches.items() if on)],
            output_dir=output_folder,
            backend=cfg.TEST.COCO_BACKEND,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    if evaluator_type == "crowdhuman":
        from kd_det.evaluation.crowdhuman import CrowdHumanEvaluator

        return CrowdHumanEvaluator(
            dataset_name, output_dir=output_folder, rules=cfg.TEST.CROWDHUMAN_RULES
        )
    raise ValueError(
        f"data set {dataset_name!r} has evaluator_type {evaluator_type!r}; kd_det evaluates "
        f"{list(SUPPORTED)}. Data in COCO format gets one by being listed under KD.DATASETS"
    )
