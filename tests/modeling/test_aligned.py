import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

import kd_det.modeling  # noqa: F401
from kd_det.config import add_kd_config
from kd_det.functional.resize import reduce_image
from kd_det.modeling.aligned import BRANCHES, paired_levels
from kd_det.modeling.aligned_fpn import LevelSelectingFPN

DENSE = ["FCOS", "RetinaNet", "ATSS", "GFL"]
DETECTORS = [*DENSE, "Faster", "Mask", "Keypoint"]
HIGH = ["p3", "p4", "p5", "p6", "p7"]
LOW = ["p2", "p3", "p4", "p5", "p6"]


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    torch.manual_seed(0)
    with EventStorage() as storage:
        yield storage


def detector_cfg(name: str, levels: list[str]) -> CfgNode:
    """A narrow detector whose heads read `levels`; anchors scale with the finest stride."""
    cfg = get_cfg()
    add_kd_config(cfg)
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.BACKBONE.NAME = "build_fpn_backbone"
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = 18
    model.RESNETS.NORM = "GN"
    model.PIXEL_STD = [60.0, 60.0, 60.0]
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 8
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = 16
    model.META_ARCHITECTURE = name if name in DENSE else "GeneralizedRCNN"
    for key in ("RPN", "ROI_HEADS"):
        model[key].IN_FEATURES = levels
    for key in (name.upper() for name in DENSE):
        model[key].IN_FEATURES = levels
        model[key].NUM_CLASSES = 3
        # A group of one channel has no statistics on a 1x1 map.
        model[key].NORM = ""
        model[key].NUM_CONVS = 1
        model[key].SCORE_THRESH_TEST = 0.0
    model.FPN.TOP_BLOCK = "p6_c5" if levels[-1] == "p6" else "p6p7_c5"
    scale = 2 ** (int(levels[0][1]) - 3)
    model.ANCHOR_GENERATOR.SIZES = [[32 * scale * 2**i] for i in range(len(levels))]
    roi = model.ROI_HEADS
    model.ROI_HEADS.NAME = "StandardROIHeads"
    roi.NUM_CLASSES, roi.BATCH_SIZE_PER_IMAGE, roi.SCORE_THRESH_TEST = 3, 16, 0.0
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TRAIN = 50
    model.RPN.PRE_NMS_TOPK_TEST = model.RPN.POST_NMS_TOPK_TEST = 50
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_BOX_HEAD.POOLER_RESOLUTION = 32, 3
    model.MASK_ON = name == "Mask"
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.KEYPOINT_ON = name == "Keypoint"
    model.ROI_KEYPOINT_HEAD.CONV_DIMS, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = [8], 4
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def aligned(name: str, norm: str = "GN", **options: Any) -> nn.Module:
    """An aligned detector around `detector_cfg(name, HIGH)`."""
    cfg = detector_cfg(name, HIGH)
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    for key, value in options.items():
        cfg.MODEL.ALIGNED[key] = value
    return build_model(cfg)


def instances(height: int, width: int, boxes: list[list[float]]) -> Instances:
    """Ground truth with masks and four visible keypoints inside each box."""
    tensor = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    points = torch.zeros(len(boxes), 4, 3)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        masks[i, int(y0) : int(y1), int(x0) : int(x1)] = True
        corners = [(x0, y0), (x1, y0), (x0, y1), (x1, y1)]
        points[i] = torch.tensor([[0.9 * x + 2, 0.9 * y + 2, 2] for x, y in corners])
    return Instances(
        (height, width),
        gt_boxes=Boxes(tensor),
        gt_classes=torch.arange(len(boxes)) % 3,
        gt_masks=BitMasks(masks),
        gt_keypoints=Keypoints(points),
    )


def batch(empty: bool = False) -> list[dict[str, Any]]:
    """Two images of different sizes, neither a multiple of 64."""
    sizes = [(61, 100), (80, 57)]
    boxes = [[[4.0, 6.0, 30.0, 50.0], [50.0, 20.0, 90.0, 55.0]], [[10.0, 12.0, 50.0, 70.0]]]
    return [
        {
            "image": torch.rand(3, h, w) * 255,
            "height": 2 * h,
            "width": 2 * w,
            "instances": instances(h, w, [] if empty else found),
        }
        for (h, w), found in zip(sizes, boxes, strict=True)
    ]


def calls_of(module: nn.Module, action: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """(inputs, output) of each call of a module during an action."""
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, inputs, out: calls.append((inputs, out)))
    try:
        action()
    finally:
        handle.remove()
    return calls


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide:RuntimeWarning")
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_gets_a_gradient(name: str, empty: bool) -> None:
    model = aligned(name)
    losses = model(batch(empty))
    plain = {key.rsplit("_", 1)[0] for key in losses}
    assert set(losses) == {f"{key}_{branch}" for key in plain for branch in BRANCHES}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert without == []
    if not empty:
        assert all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", DETECTORS)
def test_high_branch_equals_the_wrapped_detector(name: str) -> None:
    """Losses and detections of the high branch are those of the detector alone, padded alike."""
    model = aligned(name, EVAL_BRANCH="high", LOSS_WEIGHTS=[0.5, 1.0, 0.4])
    data = batch()
    torch.manual_seed(1)
    alone = copy.deepcopy(model.detector)(data)
    torch.manual_seed(1)
    losses = model(data)
    assert {f"{key}_high" for key in alone} <= set(losses)
    for key, loss in alone.items():
        torch.testing.assert_close(losses[f"{key}_high"], 0.5 * loss)
    model.eval()
    for found, expected in zip(model(data), model.detector(data), strict=True):
        assert_same_detections(found["instances"], expected["instances"])


def assert_same_detections(found: Instances, expected: Instances, atol: float = 1e-3) -> None:
    assert len(found) == len(expected) > 0
    assert found.image_size == expected.image_size
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=atol, rtol=1e-5
    )
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()


@pytest.mark.parametrize("name", DETECTORS)
def test_low_branch_equals_a_plain_detector_on_the_reduced_image(name: str) -> None:
    """Same weights by name; boxes come out in the full frame without any scaling."""
    model = aligned(name, EVAL_BRANCH="low", INTERPOLATION="area").eval()
    student = build_model(detector_cfg(name, LOW)).eval()
    state = model.inheritable_state()
    student.load_state_dict({key: state[key] for key in student.state_dict()})
    assert set(state) - set(student.state_dict()) == {
        "backbone.top_block.p7.weight",
        "backbone.top_block.p7.bias",
    }
    image = torch.rand(3, 96, 128) * 255
    full = {"image": image, "height": 96, "width": 128}
    reduced = {"image": reduce_image(image, 2, "area"), "height": 96, "width": 128}
    found, expected = model([full])[0]["instances"], student([reduced])[0]["instances"]
    assert_same_detections(found, expected)
    if name == "Mask":
        assert (found.pred_masks == expected.pred_masks).float().mean() > 0.999
    if name == "Keypoint":
        # Heatmaps, as the points themselves are rounded to pixels of the view.
        heatmaps = []
        for detector, item in ((model.detector, full), (student, reduced)):
            head = detector.roi_heads.keypoint_head.score_lowres
            owner = model if detector is model.detector else student
            heatmaps.append(calls_of(head, lambda: owner([item]))[0][1])  # noqa: B023
        torch.testing.assert_close(*heatmaps, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", DETECTORS)
def test_batch_of_two_equals_two_batches_of_one(name: str) -> None:
    """Images of equal size, so that padding is equal as well."""
    model = aligned(name).eval()
    data = [{"image": torch.rand(3, 64, 96) * 255} for _ in range(2)]
    together = [x["instances"] for x in model(data)]
    alone = [model([item])[0]["instances"] for item in data]
    for found, expected in zip(together, alone, strict=True):
        assert_same_detections(found, expected)
    assert not torch.equal(alone[0].scores, alone[1].scores)


@pytest.mark.parametrize("branch", BRANCHES)
def test_evaluation_runs_only_what_the_branch_needs(branch: str) -> None:
    model = aligned("RetinaNet", EVAL_BRANCH=branch).eval()
    views = calls_of(model.detector.backbone, lambda: model([{"image": torch.rand(3, 64, 100)}]))
    sizes = [tuple(inputs[0].shape[2:]) for inputs, _ in views]
    assert sizes == {"high": [(64, 128)], "low": [(32, 64)], "fused": [(64, 128), (32, 64)]}[branch]
    assert [list(out) for _, out in views] == {"high": [HIGH], "low": [LOW], "fused": [HIGH, LOW]}[
        branch
    ]
    fused = calls_of(model.fusion, lambda: model([{"image": torch.rand(3, 64, 100)}]))
    assert len(fused) == (branch == "fused")


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


@pytest.mark.parametrize("name", DENSE)
def test_targets_are_computed_once_and_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are the same objects in all branches; the loss normaliser moves once per step."""
    model = aligned(name)
    detector = type(model.detector)
    calls, labels, steps = [], [], []
    label_anchors, losses, ema = detector.label_anchors, detector.losses, detector._ema_update

    def counted(self: nn.Module, *args: Any) -> Any:
        calls.append(label_anchors(self, *args))
        return calls[-1]

    def recorded(self: nn.Module, *args: Any) -> Any:
        # Some detectors label with one object, others with (labels, boxes).
        targets = calls[-1] if isinstance(calls[-1], tuple) else (calls[-1],)
        labels.append(all(any(x is y for x in args) for y in targets))
        return losses(self, *args)

    def moved(self: nn.Module, *args: Any) -> float:
        steps.append(ema(self, *args))
        return steps[-1]

    monkeypatch.setattr(detector, "label_anchors", counted)
    monkeypatch.setattr(detector, "losses", recorded)
    monkeypatch.setattr(detector, "_ema_update", moved)
    model(batch())
    assert len(calls) == 1 and labels == [True] * 3
    assert len(steps) <= 1
    model(batch())
    assert len(calls) == 2


def test_anchors_are_sampled_once() -> None:
    model = aligned("Faster")
    rpn = model.detector.proposal_generator
    found = []
    original = rpn.losses
    rpn.losses = lambda *args: found.append(args[2]) or original(*args)
    model(batch())
    assert len(found) == 3
    assert found[0] is found[1] is found[2]


def test_loss_normaliser_moves_once_per_step() -> None:
    """Detectron2's RetinaNet: 0.9 of the old value, 100 at first, and 0.1 of the positives."""
    model = aligned("RetinaNet")
    data = batch()
    images = model.detector.preprocess_image(data)
    anchors = model.detector.anchor_generator(
        list(model._pyramids(images, ["high"])["high"].values())
    )
    labels, _ = model.detector.label_anchors(anchors, [x["instances"] for x in data])
    positives = sum(int(((x >= 0) & (x < 3)).sum()) for x in labels)
    model(data)
    assert model.detector.loss_normalizer == pytest.approx(0.9 * 100 + 0.1 * positives)


def test_trains_under_ddp_without_looking_for_unused_parameters(tmp_path: Path) -> None:
    """DDP raises in the second step when a parameter had no gradient in the first."""
    init = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        for empty in (False, True):
            model = aligned("RetinaNet", norm="BN", SPLIT_BN=True)
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                sum(parallel(batch(empty)).values()).backward()
            norm = model.detector.backbone.bottom_up.stem.conv1.norm
            assert norm.num_batches_tracked == norm.low_num_batches_tracked == 2
    finally:
        torch.distributed.destroy_process_group()


def test_branches_log_under_their_own_names(storage: EventStorage) -> None:
    aligned("Faster")(batch())
    names = {key.split("/", 1)[0] for key in storage.latest()}
    assert names == set(BRANCHES)


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


def test_split_statistics_equal_those_of_each_resolution_alone() -> None:
    """Running means after one step are those that a detector of that view alone would have."""
    model = aligned("RetinaNet", norm="BN", SPLIT_BN=True)
    plain = copy.deepcopy(model.detector.backbone)
    images = model.detector.preprocess_image(data := batch()).tensor
    model(data)
    norm = model.detector.backbone.bottom_up.res4[0].conv1.norm
    for view, name in ((images, "running_mean"), (images[..., ::2, ::2], "low_running_mean")):
        alone = copy.deepcopy(plain)
        alone(view)
        expected = alone.bottom_up.res4[0].conv1.norm.running_mean
        torch.testing.assert_close(getattr(norm, name), expected)
    assert norm.num_batches_tracked == norm.low_num_batches_tracked == 1
    state = model.inheritable_state()
    assert set(state) == set(aligned("RetinaNet", norm="BN").detector.state_dict())
    key = "backbone.bottom_up.res4.0.conv1.norm.running_mean"
    assert torch.equal(state[key], norm.low_running_mean)
    assert not torch.equal(state[key], norm.running_mean)


def test_split_statistics_survive_a_checkpoint_and_reach_evaluation() -> None:
    model = aligned("RetinaNet", norm="BN", SPLIT_BN=True, EVAL_BRANCH="low")
    for _ in range(3):
        model(batch())
    other = aligned("RetinaNet", norm="BN", SPLIT_BN=True, EVAL_BRANCH="low")
    other.load_state_dict(model.state_dict())
    data = [{"image": torch.rand(3, 64, 64) * 255}]
    found = other.eval()(data)[0]["instances"]
    assert_same_detections(found, model.eval()(data)[0]["instances"])
    cfg = detector_cfg("RetinaNet", LOW)
    cfg.MODEL.RESNETS.NORM = "BN"
    plain = build_model(cfg).eval()
    state = model.inheritable_state()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    reduced = [{"image": data[0]["image"][..., ::2, ::2], "height": 64, "width": 64}]
    assert_same_detections(found, plain(reduced)[0]["instances"])


@pytest.mark.parametrize("norm", ["FrozenBN", "GN", "SyncBN", "BN"])
def test_norms(norm: str) -> None:
    cfg = detector_cfg("RetinaNet", HIGH)
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RETINANET.NORM = "BN" if norm == "SyncBN" else ""
    cfg.MODEL.ALIGNED.SPLIT_BN = norm in ("BN", "SyncBN")
    model = build_model(cfg)
    losses = model(batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    if norm == "SyncBN":
        # Per level of the head: one update of each branch's statistics, none shared.
        head_norm = model.detector.head.cls_subnet[1][0]
        means = [head_norm.running_mean, head_norm.low_running_mean, head_norm.fused_running_mean]
        assert len({tuple(mean.tolist()) for mean in means}) == 3
    if norm in ("FrozenBN", "GN"):
        cfg.MODEL.ALIGNED.SPLIT_BN = True
        with pytest.raises(ValueError, match="no layer of the detector has running statistics"):
            build_model(cfg)


def test_masked_pooling_gets_the_sizes_without_padding() -> None:
    for masked, sizes in ((False, None), (True, [(61, 100), (80, 57)])):
        model = aligned("RetinaNet", MASK_PADDING=masked)
        ((inputs, _),) = calls_of(model.fusion, lambda: model(batch()))  # noqa: B023
        assert inputs[1:] == ([8, 16, 32, 64, 128], sizes)


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
