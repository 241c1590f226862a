"""What must hold of test sets beside training sets and models, before the first step of a run."""

import logging
import os
from collections.abc import Mapping
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from kd_det.data.dataset_checks import Contents
from kd_det.data.image_sizes import check_image_sizes

_logger = logging.getLogger("kd_det.data")
# Where a detection counts by its class index, which is that of the training data.
_OF_OBJECTS = (
    "coco",
    "coco_panoptic_seg",
    "crowdhuman",
    "lvis",
    "pascal_voc",
    "cityscapes_instance",
)


def check_test_files(cfg: CfgNode, found: Mapping[str, Contents]) -> None:
    """
    Compare the images of the test sets with their annotated sizes.

    Args:
        cfg: reads DATASETS.TEST.
        found: what the data sets hold, from `check_datasets`.

    Raises:
        RuntimeError, ValueError: from `check_image_sizes`.
    """
    for name in cfg.DATASETS.TEST:
        root, images = found[name].root, found[name].images
        files = [(os.path.join(root, file), width, height) for file, width, height in images]
        check_image_sizes(name, files)


def check_objects(cfg: CfgNode, found: Mapping[str, Contents]) -> None:
    """
    Refuse test sets that no AP can be measured on.

    Without "annotations" in its file, a set describes images to predict on: that is told alone, as
    are sets of other formats, whose evaluators may measure something else.

    Args:
        cfg, found: as for `check_test_files`.

    Raises:
        ValueError: a file in COCO format lists annotations, and none is of an object.
    """
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in _OF_OBJECTS or found[name].objects:
            continue
        problem = (
            f"test set {name!r} has no annotated object beside crowds, so there is no AP on it"
        )
        if kind == "coco" and found[name].objects == 0:
            raise ValueError(
                f"{problem}. Annotate its objects, take {name!r} out of DATASETS.TEST, or, for "
                'predictions alone, take the empty list "annotations" out of its file.'
            )
        _logger.warning("The %s.", problem)


def check_classes_tested(
    cfg: CfgNode, found: Mapping[str, Contents], *, of_teacher: bool = False
) -> None:
    """
    Refuse test sets whose classes are not those of the training sets, by their indices.

    Sets whose classes have no known names are passed over. One class each, under two names, is
    only warned about: there is nothing to mix up.

    Args:
        cfg, found: as for `check_test_files`; cfg.DATASETS.TRAIN too.
        of_teacher: the model is there to teach, and may know other classes than are measured:
            what does not stop its evaluation is only warned about.

    Raises:
        ValueError: they differ; the message has the first difference.
    """
    known = {name: _class_names(name, contents) for name, contents in found.items()}
    trained = [name for name in cfg.DATASETS.TRAIN if known[name]]
    for test in cfg.DATASETS.TEST if trained else ():
        if MetadataCatalog.get(test).get("evaluator_type") not in _OF_OBJECTS:
            continue
        train = trained[0]  # Detectron2 wants the others to have the same
        problem = _difference(train, known[train], test, known[test])
        if not problem:
            continue
        counts = len(known[train]), len(known[test])
        if counts != (1, 1) and not (of_teacher and counts[0] <= counts[1]):
            raise ValueError(problem)
        _logger.warning("%s", problem)


def _difference(train: str, trained: list[str], test: str, tested: list[str]) -> str:
    """Return what to say of two data sets' classes, "" where they are the same or not known."""
    pairs = enumerate(zip_longest(trained, tested, fillvalue=None))
    first = next(((i, *pair) for i, pair in pairs if pair[0] != pair[1]), None)
    if not tested or first is None:
        return ""
    shown = ["none" if name is None else repr(name) for name in first[1:]]
    return (
        f"DATASETS.TEST {test!r} has {len(tested)} classes, DATASETS.TRAIN {train!r} has "
        f"{len(trained)}, and class {first[0]} is {shown[0]} in training and {shown[1]} in the "
        "test: a model knows classes by their index, so its detections would be scored as other "
        'classes. Give both annotation files the same "categories" (their ids in ascending order '
        "are the indices 0, 1, ...), with or without objects of each."
    )


def _class_names(name: str, contents: Contents) -> list[str]:
    """Return a data set's names of things by index, as its loader and evaluator have them."""
    metadata = MetadataCatalog.get(name)
    names = list(metadata.get("thing_classes") or contents.classes)
    # COCO's panoptic sets list what is no thing behind the things.
    indices = sorted((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
    return [names[i] for i in indices] if indices and indices[-1] < len(names) else names
