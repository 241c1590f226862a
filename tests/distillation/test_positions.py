"""Predictions of two dense heads, position by position."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kd_det.distillation.batch import Frame
from kd_det.distillation.positions import pair_predictions
from kd_det.distillers import DensePredictions

SIZES = {8.0: (4, 6), 16.0: (2, 3), 32.0: (1, 2)}


def predictions(*strides: float, anchors: int = 1, more: int = 0, **keys: Any) -> DensePredictions:
    """Return numbers that say where they are: logit 0 is the row, 1 the column, 2 the anchor."""
    logits = []
    sizes = [(SIZES[stride][0] + more, SIZES[stride][1] + more) for stride in strides]
    for height, width in sizes:
        places = torch.cartesian_prod(*(torch.arange(n) for n in (height, width, anchors)))
        logits.append(places.reshape(1, -1, 3).float())
    given: dict[str, Any] = {
        "logits": logits,
        "boxes": [torch.zeros(1, x.shape[1], 4) for x in logits],
        "strides": list(strides),
        "sizes": sizes,
        "offset": 0.5,
        "anchors": [torch.full((anchors, 2), 4 * s) for s in strides],
    }
    return DensePredictions(**{**given, **keys})


def with_anchors(factor: float | None) -> DensePredictions:
    """Return two anchors per position, of another size, or of unknown ones."""
    found = predictions(8.0, anchors=2)
    return replace(found, anchors=None if factor is None else [found.anchors[0] * factor])


def pair(own: DensePredictions, other: DensePredictions, **keys: bool) -> list[Any]:
    return pair_predictions(own, other, **{"classes": True, "bins": False, **keys})


def test_levels_of_equal_stride_pair_from_fine_to_coarse() -> None:
    pairs = pair(predictions(32.0, 8.0, 16.0), predictions(16.0, 32.0))
    assert [(x.student, x.teacher, x.stride) for x in pairs] == [(2, 0, 16.0), (0, 1, 32.0)]


def test_both_are_cut_to_the_common_positions() -> None:
    own, other = predictions(8.0, 16.0, anchors=2), predictions(16.0, anchors=2, more=2)
    (level,) = pair(own, other)
    frame = Frame.of([(20, 48)], torch.device("cpu"))
    found = frame.predictions(level, own, other)
    assert found.grid == (2, 3, 16.0, 0.5)
    # The same positions and anchors beside each other.
    assert torch.equal(found.student.logits, found.teacher.logits)
    assert found.student.logits[0, -1].tolist() == [1, 2, 1]
    # Of the two rows the second's centre, at 24, is beyond the image's 20 pixels.
    assert found.valid().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_images_beyond_the_common_positions_are_an_error() -> None:
    own, other = predictions(8.0), predictions(8.0, more=2)
    (level,) = pair(own, other)
    with pytest.raises(RuntimeError, match="do not see the same image"):
        Frame.of([(48, 64)], torch.device("cpu")).predictions(level, own, other)


@pytest.mark.parametrize(
    ("own", "other", "keys", "words"),
    [
        (predictions(8.0), predictions(16.0), {}, r"strides are \[8.0\] and \[16.0\]; their heads"),
        (
            predictions(8.0),
            predictions(8.0, offset=0.0),
            {},
            r"offsets .* are 0.5 and 0.0; set MODEL.ANCHOR_GENERATOR.OFFSET",
        ),
        (predictions(8.0, anchors=3), predictions(8.0), {}, r"per position are 3 and 1; take"),
        (
            predictions(8.0, anchors=2),
            with_anchors(1.02),
            {},
            r"anchors at stride 8 are .*32.0.* and .*32.6.*; give both the same",
        ),
        (
            predictions(8.0, anchors=2),
            with_anchors(None),
            {},
            r"are known and unknown; let the decoder fill",
        ),
        (
            predictions(8.0),
            replace(predictions(8.0), logits=[torch.zeros(1, 24, 5)]),
            {},
            r"classes are 3 and 5; train both on the same classes",
        ),
        (predictions(8.0), predictions(8.0), {"bins": True}, r"are 0 and 0; both must be .*GFL"),
        (
            predictions(8.0, distributions=[torch.zeros(1, 24, 4, 17)]),
            predictions(8.0, distributions=[torch.zeros(1, 24, 4, 9)]),
            {"bins": True},
            r"bins per side of a box are 17 and 9; .*MODEL.GFL.REG_MAX",
        ),
    ],
)
def test_what_does_not_mean_the_same_is_refused(
    own: DensePredictions, other: DensePredictions, keys: dict[str, bool], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pair(own, other, **keys)


def test_other_classes_are_fine_where_they_are_not_compared() -> None:
    other = replace(predictions(8.0), logits=[torch.zeros(1, 24, 5)])
    assert len(pair(predictions(8.0), other, classes=False)) == 1


def test_anchors_scale_with_the_view() -> None:
    scaled = predictions(8.0).scaled(2.0)
    assert scaled.anchors is not None
    assert scaled.anchors[0].tolist() == [[64, 64]]
    assert scaled.strides == [16.0]
