from collections.abc import Iterator

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny_aligned import HIGH, LOW, aligned, batch, calls_of, detector_cfg

import kd_det.modeling  # noqa: F401
from kd_det.modeling.aligned import BRANCHES, paired_levels
from kd_det.modeling.aligned_fpn import LevelSelectingFPN


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
    """The smallest padded size, odd levels, and sizes on both sides of a multiple."""
    cfg = detector_cfg("RetinaNet", levels)
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.ALIGNED.FACTOR = factor
    model = build_model(cfg)
    for size in [(1, 1), (63, 65), (32 * factor, 96 * factor), (129, 32 * factor + 1)]:
        images = model.detector.preprocess_image([{"image": torch.rand(3, *size)}])
        with torch.no_grad():
            pyramids = model._pyramids(images, BRANCHES)
        shapes = [[x.shape for x in pyramid.values()] for pyramid in pyramids.values()]
        assert shapes[0] == shapes[1] == shapes[2]
        strides = [-(-images.tensor.shape[2] // x[2]) for x in shapes[0]]
        assert strides[:2] == model.strides[:2] == [4 * factor, 8 * factor]


def test_invalid_pairings_say_what_to_change() -> None:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in range(2, 8)}
    assert paired_levels(shapes, {"p4", "p3"}, 2) == (["p3", "p4"], ["p2", "p3"])
    assert paired_levels(shapes, {"p5", "p6"}, 8) == (["p5", "p6"], ["p2", "p3"])
    with pytest.raises(ValueError, match=r"partners of p3 have stride 2, .* start at stride 16"):
        paired_levels(shapes, HIGH, 4)
    with pytest.raises(ValueError, match=r"FACTOR must be 2, 4, 8, .*, found 3"):
        paired_levels(shapes, HIGH, 3)
    with pytest.raises(ValueError, match="EVAL_BRANCH 'both'"):
        aligned("RetinaNet", EVAL_BRANCH="both")
    with pytest.raises(ValueError, match="INTERPOLATION is 'cubic'"):
        aligned("RetinaNet", INTERPOLATION="cubic")
    with pytest.raises(ValueError, match="itself; name the detector"):
        aligned("RetinaNet", META_ARCHITECTURE="AlignedMultiScaleDetector")
