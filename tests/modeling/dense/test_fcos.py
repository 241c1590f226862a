"""FCOS from yaml: parity with Detectron2's class, images without boxes, norms in the towers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

import kd_det.modeling  # noqa: F401
from kd_det.config import add_kd_config
from kd_det.modeling.norms import GroupNorm

CLASSES = 3


def make_cfg(*opts: Any) -> CfgNode:
    """A small FCOS without batch statistics in the backbone, so that images do not mix."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(
        [
            *["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.DEVICE", "cpu"],
            *["MODEL.PIXEL_STD", [58.0] * 3],
            *["MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0],
            *["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32],
            *["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.NORM", "GN"],
            *["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]],
            *["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 64],
            *["MODEL.FCOS.NUM_CLASSES", CLASSES, "MODEL.FCOS.NUM_CONVS", 1, *opts],
        ]
    )
    return cfg


def make_model(*opts: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(make_cfg(*opts))


def make_image(boxes: Sequence[Sequence[float]], classes: Sequence[int], seed: int) -> dict:
    instances = Instances(
        (64, 64),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances}


def with_objects(seed: int = 1) -> dict:
    return make_image([[4, 4, 40, 30], [20, 20, 60, 62], [30, 5, 50, 20]], [0, 2, 1], seed)


def without_objects(seed: int = 2) -> dict:
    return make_image([], [], seed)


def losses_of(model: torch.nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    # The running normaliser starts afresh, so that values of separate calls compare.
    vars(model).pop("loss_normalizer", None)
    with EventStorage():
        return model(batch)


def head_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("head.")}


def test_one_step_reaches_every_parameter_and_lowers_the_loss() -> None:
    model = make_model()
    batch = [with_objects(), with_objects(seed=3)]
    before = losses_of(model, batch)
    assert set(before) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    sum(before.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads.values())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert sum(losses_of(model, batch).values()) < sum(before.values())


def test_evaluation_keeps_boxes_inside_the_image_and_honours_the_limit() -> None:
    model = make_model("MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 2).eval()
    with torch.no_grad():
        (result,) = model([{**with_objects(), "height": 128, "width": 128}])
    found = result["instances"]
    assert len(found) == 2
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes.max() <= 128 and boxes.max() > 64
    assert set(found.pred_classes.tolist()) <= set(range(CLASSES))


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_equals_detectron2s_own_class_bit_for_bit(norm: str) -> None:
    opts = ["MODEL.FCOS.NORM", norm, "MODEL.FCOS.CENTER_SAMPLING_RADIUS", 1.2]
    opts += ["MODEL.FCOS.FOCAL_LOSS_ALPHA", 0.3, "MODEL.FCOS.FOCAL_LOSS_GAMMA", 1.5]
    opts += ["MODEL.FCOS.SCORE_THRESH_TEST", 0.05, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 50]
    opts += ["MODEL.FCOS.NMS_THRESH_TEST", 0.7, "TEST.DETECTIONS_PER_IMAGE", 9]
    ours, donor = make_model(*opts), make_model(*opts)
    stock = detectron2_fcos.FCOS(
        backbone=donor.backbone,
        head=detectron2_fcos.FCOSHead(
            input_shape=list(donor.backbone.output_shape().values()),
            conv_dims=[64],
            num_classes=CLASSES,
            norm=GroupNorm if norm == "GN" else norm,
        ),
        num_classes=CLASSES,
        center_sampling_radius=1.2,
        focal_loss_alpha=0.3,
        focal_loss_gamma=1.5,
        test_score_thresh=0.05,
        test_topk_candidates=50,
        test_nms_thresh=0.7,
        max_detections_per_image=9,
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[58.0] * 3,
    )
    stock.load_state_dict(ours.state_dict())
    batch = [with_objects(), with_objects(seed=3)]
    expected = losses_of(stock, batch)
    for name, value in losses_of(ours, batch).items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        found, wanted = ours.eval()(batch), stock.eval()(batch)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
        assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)


def test_initial_class_probability_is_the_prior() -> None:
    model = make_model("MODEL.FCOS.PRIOR_PROB", 0.2)
    probability = model.head.cls_score.bias.sigmoid()
    torch.testing.assert_close(probability, torch.full((CLASSES,), 0.2))


def test_boxes_start_at_the_given_distance() -> None:
    assert make_model("MODEL.FCOS.BOX_BIAS", 2.0).head.bbox_pred.bias.tolist() == [2.0] * 4
    assert make_model().head.bbox_pred.bias.tolist() == [0.0] * 4  # Detectron2's


def test_image_without_boxes_adds_background_only() -> None:
    model = make_model()
    full = losses_of(model, [with_objects()])
    mixed = losses_of(model, [with_objects(), without_objects()])
    # Its positions are all negatives of the focal loss, under the same normaliser.
    images = model.preprocess_image([without_objects()])
    features = list(model.backbone(images.tensor).values())
    logits = torch.cat([x.flatten() for x in model.head(features)[0]])
    negatives = sigmoid_focal_loss(
        logits, torch.zeros_like(logits), alpha=0.25, gamma=2.0, reduction="sum"
    )
    torch.testing.assert_close(
        mixed["loss_fcos_cls"], full["loss_fcos_cls"] + negatives / model.loss_normalizer
    )
    torch.testing.assert_close(mixed["loss_fcos_loc"], full["loss_fcos_loc"])
    torch.testing.assert_close(mixed["loss_fcos_ctr"], full["loss_fcos_ctr"])
    assert full["loss_fcos_loc"] > 0


def test_batch_without_any_box_gives_zeros_that_reach_every_head_parameter() -> None:
    model = make_model()
    losses = losses_of(model, [without_objects(), without_objects(seed=5)])
    assert losses["loss_fcos_cls"] > 0
    assert losses["loss_fcos_loc"] == 0 and losses["loss_fcos_ctr"] == 0
    sum(losses.values()).backward()
    for name, parameter in head_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_centerness_targets_are_defined_where_they_are_used() -> None:
    model = make_model()
    batch = [with_objects()]
    features = list(model.backbone(model.preprocess_image(batch).tensor).values())
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in batch])
    targets = model.compute_ctrness_targets(anchors, boxes)[0]
    positive = labels[0] != CLASSES
    assert positive.any()
    assert (targets[positive] > 0).all() and (targets[positive] <= 1).all()
    # Position (12, 20) of P3 lies in the first box alone: l, t, r, b = 8, 16, 28, 10.
    index = 2 * 8 + 1
    assert labels[0][index] == 0
    torch.testing.assert_close(targets[index], torch.tensor((8 / 28 * 10 / 16) ** 0.5))


def test_batch_norm_towers_keep_statistics_per_level_under_hooks() -> None:
    model = make_model("MODEL.FCOS.NORM", "BN")
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    handles = [
        model.head.cls_subnet[0].register_forward_hook(lambda m, x, y: before.append(y)),
        model.head.cls_subnet[1].register_forward_hook(lambda m, x, y: after.append(y)),
    ]
    # Batch 2 because P7 is one pixel here, and batch statistics need two values.
    losses_of(model, [with_objects(), with_objects(seed=3)])
    for handle in handles:
        handle.remove()
    norm = model.head.cls_subnet[1]
    assert len(before) == len(after) == len(norm) == 5
    for level, (x, y) in enumerate(zip(before, after, strict=True)):
        torch.testing.assert_close(norm[level].running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


def test_group_norm_towers_take_widths_that_32_does_not_divide() -> None:
    model = make_model("MODEL.FPN.OUT_CHANNELS", 24)
    assert model.head.cls_subnet[1].num_groups == 8
    assert losses_of(model, [with_objects()])["loss_fcos_cls"].isfinite()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.FCOS.IN_FEATURES", ["p2", "p3"], r"MODEL.FCOS.IN_FEATURES .*'p2'.* gives .*'p3'"),
        ("MODEL.FCOS.NUM_CONVS", 0, "NUM_CONVS is 0"),
    ],
)
def test_impossible_head_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(key, value)
