from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_aligned import HIGH, LOW, aligned, batch, detector_cfg
from tiny_runs import calls_of

import kd_det.modeling  # noqa: F401
from kd_det.modeling.msad.aligned import BRANCHES
from kd_det.modeling.msad.fpn import LevelSelectingFPN, paired_levels


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    torch.manual_seed(0)
    with EventStorage() as storage:
        yield storage


def test_level_selection_equals_detectron2s_fpn() -> None:
    for top_block in ("p6p7_c5", "p6p7_p5", "p6_c5", "maxpool", "none"):
        for fuse in ("sum", "avg"):
            cfg = detector_cfg("RetinaNet", HIGH)
            cfg.MODEL.FPN.TOP_BLOCK, cfg.MODEL.FPN.FUSE_TYPE = top_block, fuse
            fpn = build_backbone(cfg).eval()
            x = torch.randn(1, 3, 64, 64)
            expected = fpn(x)
            selecting = LevelSelectingFPN(fpn, 64).eval()
            assert set(selecting.state_dict()) == set(fpn.state_dict())
            for levels in (None, LOW, HIGH, ["p6"], ["p5"], ["p4", "p2"]):
                if set(levels or ()) <= set(expected):
                    found = selecting(x, levels)
                    assert list(found) == [k for k in expected if levels is None or k in levels]
                    for level, value in found.items():
                        assert torch.equal(value, expected[level])


def test_levels_nobody_wants_are_not_computed() -> None:
    model = aligned("RetinaNet")
    backbone = model.detector.backbone
    for path, sizes in {
        "fpn_output2": [(16, 16)],
        "fpn_lateral2": [(16, 16)],
        "top_block.p7": [(1, 1)],
        "fpn_output3": [(16, 16), (8, 8)],
    }.items():
        calls = calls_of(backbone.get_submodule(path), lambda: model(batch()))
        assert [tuple(out.shape[2:]) for _, out in calls] == sizes, path


@pytest.mark.parametrize(("factor", "levels"), [(2, HIGH), (4, ["p4", "p5", "p6", "p7"])])
def test_pairs_lie_on_the_same_grid(factor: int, levels: list[str]) -> None:
    """(a): the smallest padded size, sizes on both sides of a multiple, and any others."""
    cfg = detector_cfg("RetinaNet", levels)
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.ALIGNED.FACTOR = factor
    model = build_model(cfg)

    @given(st.integers(1, 400), st.integers(1, 400))
    @example(1, 1)
    @example(63, 65)
    @example(32 * factor, 96 * factor)
    @example(129, 32 * factor + 1)
    @settings(max_examples=25, deadline=None)
    def check(height: int, width: int) -> None:
        images = model.detector.preprocess_image([{"image": torch.rand(3, height, width)}])
        with torch.no_grad():
            pyramids = model._pyramids(images, BRANCHES)
        shapes = [[x.shape for x in pyramid.values()] for pyramid in pyramids.values()]
        assert shapes[0] == shapes[1] == shapes[2]
        strides = [-(-images.tensor.shape[2] // x[2]) for x in shapes[0]]
        assert strides[:2] == model.strides[:2] == [4 * factor, 8 * factor]

    check()


def test_invalid_pairings_say_what_to_change() -> None:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in range(2, 8)}
    assert paired_levels(shapes, {"p4", "p3"}, 2) == (["p3", "p4"], ["p2", "p3"])
    assert paired_levels(shapes, {"p5", "p6"}, 8) == (["p5", "p6"], ["p2", "p3"])
    with pytest.raises(ValueError, match=r"partners of p3 have stride 2, .* start at stride 16"):
        paired_levels(shapes, HIGH, 4)
    with pytest.raises(ValueError, match=r"FACTOR must be 2, 4, 8, .*, found 3"):
        paired_levels(shapes, HIGH, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"EVAL_BRANCH": "both"}, "EVAL_BRANCH 'both'"),
        ({"LOSS_WEIGHTS": [1.0, -1.0, 0.4]}, r"LOSS_WEIGHTS is \[1.0, -1.0, 0.4\]; expected"),
        ({"LOSS_WEIGHTS": [0.0, 0.0, 0.0]}, "at least one of them above"),
        ({"FUSION": "mean", "MASK_PADDING": True}, "FUSION 'mean' pools nothing"),
    ],
)
def test_invalid_options_say_what_to_change(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aligned("RetinaNet", **options)


def test_a_detector_with_losses_of_its_own_is_refused() -> None:
    cfg = detector_cfg("Faster", HIGH)
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "PanopticFPN"
    with pytest.raises(TypeError, match="names a PanopticFPN"):
        build_model(cfg)
    with pytest.raises(ValueError, match="INTERPOLATION is 'cubic'"):
        aligned("RetinaNet", INTERPOLATION="cubic")
    with pytest.raises(ValueError, match="itself; name the detector"):
        aligned("RetinaNet", META_ARCHITECTURE="AlignedMultiScaleDetector")
