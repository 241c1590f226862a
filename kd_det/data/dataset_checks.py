"""What must hold of all data that a config names, before the first step of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge

from kd_det.data.coco_checks import checked_coco
from kd_det.reading import load_pickle
from kd_det.text import nearest


class Contents(NamedTuple):
    """
    What a data set holds.

    Attributes:
        images: file name, width and height in pixels of each whose size is annotated.
        root: folder that the file names are relative to.
        classes: names that its own file gives, by index; empty where Detectron2 knows them.
        objects: how many there are beside crowds; None where the file lists no annotations.
    """

    images: Sequence[tuple[str, int, int]]
    root: str
    classes: Sequence[str]
    objects: int | None


def check_datasets(cfg: CfgNode) -> dict[str, Contents]:
    """
    Check the training and test sets of a config, so that none fails after hours of training.

    COCO files are read and checked as a whole; sets that are not in COCO format are loaded, which
    checks CrowdHuman's. Image files are looked for, and not opened.

    Args:
        cfg: of a plain detector, or a full config.

    Returns:
        What each of them holds, by its name.

    Raises:
        KeyError: a name that is not registered.
        FileNotFoundError: an annotation file or an image is missing.
        ValueError: an unusable entry (`check_coco`), an image that would be resized to nothing, or
            precomputed proposals that are no plain data.
    """
    check_proposals(cfg)
    train, test = dict.fromkeys(cfg.DATASETS.TRAIN), dict.fromkeys(cfg.DATASETS.TEST)
    found = {name: _check(name, cfg) for name in {**train, **test}}
    shortest = [size for size in cfg.INPUT.MIN_SIZE_TRAIN if size > 0]
    for name in train:
        _check_resizing(name, found[name], shortest, cfg.INPUT.MAX_SIZE_TRAIN, "TRAIN")
    shortest = [cfg.INPUT.MIN_SIZE_TEST] if cfg.INPUT.MIN_SIZE_TEST > 0 else []
    for name in test:
        _check_resizing(name, found[name], shortest, cfg.INPUT.MAX_SIZE_TEST, "TEST")
    return found


def check_proposals(cfg: CfgNode) -> None:
    """
    Read the precomputed proposals of a config, which are pickles, without running them.

    Detectron2 reads them again by Python's own unpickler, so this comes first.

    Raises:
        ValueError: a file is no pickle of arrays and plain containers.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        for path in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            load_pickle(path)


def _check(name: str, cfg: CfgNode) -> Contents:
    """Check one data set; return what it holds."""
    if name not in DatasetCatalog:
        raise KeyError(
            f"DATASETS: the data set {name!r} is not registered; "
            f"{nearest(name, DatasetCatalog.list())}. List your own data under KD.DATASETS."
        )
    metadata = MetadataCatalog.get(name)
    json_file, root = metadata.get("json_file"), metadata.get("image_root")
    # A panoptic set's instances stand in a COCO file of their own.
    kind = metadata.get("evaluator_type")
    if kind not in ("coco", "coco_panoptic_seg") or not json_file or root is None:
        return _loaded(name)
    if not Path(json_file).is_file():
        DatasetCatalog.get(name)  # draws what is drawn on demand, or says how to get it
    checked = checked_coco(
        name,
        Path(json_file),
        Path(root),
        masks=cfg.MODEL.MASK_ON,
        keypoints=cfg.MODEL.KEYPOINT_ON,
    )
    return Contents(
        images=checked.images,
        root=str(root),
        classes=checked.classes,
        objects=checked.objects,
    )


def _loaded(name: str) -> Contents:
    images: list[tuple[str, int, int]] = []
    objects: int | None = None
    for record in DatasetCatalog.get(name):
        if "width" in record and "height" in record:
            images.append((record["file_name"], record["width"], record["height"]))
        if "annotations" in record:
            items = record["annotations"]
            objects = (objects or 0) + sum(not item.get("iscrowd", 0) for item in items)
    return Contents(images=images, root="", classes=(), objects=objects)


def _check_resizing(
    name: str, contents: Contents, shortest: list[int], longest: int, role: str
) -> None:
    # Of each size the first image.
    sizes = {(width, height): file for file, width, height in reversed(contents.images)}
    for (width, height), file in sizes.items():
        for side in (min(shortest), max(shortest)) if shortest else ():
            new = ResizeShortestEdge.get_output_shape(height, width, side, longest)
            if min(new) < 1:
                raise ValueError(
                    f"data set {name!r}: {file} of {width} x {height} pixels (width x height) "
                    f"becomes {new[1]} x {new[0]} when INPUT.MIN_SIZE_{role} {side} and MAX_SIZE_"
                    f"{role} {longest} resize it; take it out, cut it into pieces, or raise "
                    f"INPUT.MAX_SIZE_{role}"
                )
