"""The records that a run trains on."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from kd_det.data.dataset_checks import check_proposals


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """
    Return the records of DATASETS.TRAIN in Detectron2's format.

    Raises:
        ValueError: no data set is named, or none of its images has an annotation to train on.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name the data sets to train on.")
    check_proposals(cfg)
    try:
        dataset: list[dict[str, Any]] = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:
        raise ValueError(
            f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} holds no image with an annotation to train "
            f"on ({error}). Images without any are left out by DATALOADER.FILTER_EMPTY_ANNOTATIONS."
        ) from error
    return dataset


def check_classes(
    dataset: Sequence[dict[str, Any]], names: Sequence[str], *, model: str, num_classes: int
) -> None:
    """
    Refuse data with more classes than the model: their labels would mean background.

    Args:
        dataset: records in Detectron2's format.
        names: of the data sets, for the message.
        model: the meta-architecture, for the message.
        num_classes: how many classes it predicts.

    Raises:
        ValueError: an object's class index is num_classes or more.
    """
    labels = {item["category_id"] for record in dataset for item in record.get("annotations", [])}
    if labels and max(labels) >= num_classes:
        raise ValueError(
            f"DATASETS.TRAIN {list(names)} has objects of class index {max(labels)}, but the "
            f"{model} of this config predicts {num_classes} classes; set its NUM_CLASSES to "
            f"{max(labels) + 1} or more."
        )


def check_classes_evaluated(cfg: CfgNode, *, model: str, num_classes: int) -> None:
    """
    Refuse a model with more classes than the data: what it finds of them could not be evaluated.

    Args:
        cfg: reads DATASETS, whose training sets are loaded.
        model: the meta-architecture, for the message.
        num_classes: how many classes it predicts.

    Raises:
        ValueError: there is a test set of objects, and the training data has fewer classes.
    """
    kinds = [MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST]
    known = [len(MetadataCatalog.get(name).get("thing_classes", ())) for name in cfg.DATASETS.TRAIN]
    if "coco" in kinds and known and 0 < max(known) < num_classes:
        raise ValueError(
            f"The {model} of this config predicts {num_classes} classes, but DATASETS.TRAIN "
            f"{list(cfg.DATASETS.TRAIN)} has {max(known)}, and what it finds of the others could "
            f"not be evaluated; set its NUM_CLASSES to {max(known)}."
        )


def check_boxes(dataset: Sequence[dict[str, Any]], names: Sequence[str], needed_by: str) -> None:
    """
    Refuse data without boxes where a distiller needs them.

    Args:
        dataset: records in Detectron2's format.
        names: of the data sets, for the message.
        needed_by: whose needs they are, for the message.

    Raises:
        ValueError: a record lists no annotations, not even an empty list.
    """
    without = next((record for record in dataset if "annotations" not in record), None)
    if without is not None:
        raise ValueError(
            f"{needed_by} needs boxes, but DATASETS.TRAIN {list(names)} has images without "
            f"'annotations' (e.g. {without.get('file_name')}); take it out of KD.DISTILLERS, or "
            "train on data with boxes."
        )
