"""Pairing the predictions of two dense heads, position by position."""

from collections.abc import Sequence
from typing import Any, NoReturn

from kd_det.distillation.pairing import LevelPair
from kd_det.distillers.predictions import DensePredictions
from kd_det.functional.level_grid import same_stride

# Positions apart by no more than this fraction of the stride are the same.
_SAME_PLACE = 0.01
# So are anchors whose sides differ by no more than this fraction.
_SAME_SIDE = 0.01


def pair_predictions(
    student: DensePredictions, teacher: DensePredictions, *, classes: bool, bins: bool
) -> list[LevelPair]:
    """
    Pair the levels of equal stride, and check that what is compared there means the same.

    Args:
        student, teacher: what both models predict for some image, in the loaded image's pixels.
        classes: class scores are compared.
        bins: distributions over bins are compared.

    Returns:
        Pairs from fine to coarse. Levels without a partner stay out.

    Raises:
        ValueError: no common stride; other positions, anchors, classes or bins. The message has
            both values and names the remedy.
    """
    pairs = [
        LevelPair(i, j, f"stride {stride:g}", stride, 1.0)
        for i, stride in enumerate(student.strides)
        for j, other in enumerate(teacher.strides)
        if same_stride(stride, other)
    ]
    if not pairs:
        _refuse(
            "strides",
            student.strides,
            teacher.strides,
            "their heads must read levels of common strides, for reduced views in the loaded "
            "image's pixels",
        )
    if abs(student.offset - teacher.offset) > _SAME_PLACE:
        _refuse(
            "offsets of positions in their cells",
            student.offset,
            teacher.offset,
            "set MODEL.ANCHOR_GENERATOR.OFFSET of both alike (Detectron2's FCOS has 0.5), and "
            "train the teacher with it",
        )
    counts = student.anchors_per_position(), teacher.anchors_per_position()
    if counts[0] != counts[1]:
        _refuse("anchors per position", *counts, "take a teacher with as many anchors")
    if counts[0] > 1:
        _check_anchors(student, teacher, pairs)
    if classes and student.logits[0].shape[2] != teacher.logits[0].shape[2]:
        found = student.logits[0].shape[2], teacher.logits[0].shape[2]
        _refuse("classes", *found, "train both on the same classes")
    if bins:
        _check_bins(student, teacher)
    return sorted(pairs, key=lambda pair: pair.stride)


def _check_anchors(
    student: DensePredictions, teacher: DensePredictions, pairs: Sequence[LevelPair]
) -> None:
    remedy = "give both the same MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS"
    if student.anchors is None or teacher.anchors is None:
        own, other = ("unknown" if x.anchors is None else "known" for x in (student, teacher))
        _refuse("sizes of anchors", own, other, "let the decoder fill `DensePredictions.anchors`")
    for pair in pairs:
        mine, theirs = student.anchors[pair.student], teacher.anchors[pair.teacher]
        if ((mine - theirs).abs() > _SAME_SIDE * theirs).any():
            _refuse(f"anchors at {pair.name}", mine.tolist(), theirs.tolist(), remedy)


def _check_bins(student: DensePredictions, teacher: DensePredictions) -> None:
    own, other = (
        0 if x.distributions is None else x.distributions[0].shape[-1] for x in (student, teacher)
    )
    if student.anchors is None:
        _refuse("sizes of anchors", "unknown", "-", "let the decoder fill their `anchors`")
    if own != other or not own:
        remedy = "both must be detectors like GFL, with the same MODEL.GFL.REG_MAX"
        _refuse("bins per side of a box", own, other, remedy)


def _refuse(what: str, student: Any, teacher: Any, remedy: str) -> NoReturn:
    raise ValueError(
        f"The predictions of student and teacher cannot be compared: {what} are {student} and "
        f"{teacher}; {remedy}."
    )
