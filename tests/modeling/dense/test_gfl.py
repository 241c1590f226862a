"""GFL: losses by hand, decoding with each level's own stride."""

import math

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import pairwise_iou
from tiny_dense import build_tiny, overfit, two_images

from kd_det.modeling.dense.atss_assigner import Positives

LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)

# Anchors of 8 strides: stride 2 with centre (8, 8), stride 4 with centre (16, 16). With REG_MAX 4
# and uniform bins each distance is 2 strides: boxes [4, 4, 12, 12] and [8, 8, 24, 24].
ANCHORS = torch.tensor([[0.0, 0, 16, 16], [0, 0, 32, 32]])
TWO = Positives(
    index=torch.tensor([0, 1]),
    classes=torch.tensor([1, 0]),
    boxes=torch.tensor([[4.0, 4, 12, 12], [8, 8, 24, 16]]),
    anchors=ANCHORS,
)


def build_gfl(reg_max: int = 4) -> torch.nn.Module:
    return build_tiny("gfl", "MODEL.GFL.REG_MAX", reg_max)


def test_decoding_uses_the_stride_of_each_level() -> None:
    boxes = build_gfl().decode_boxes(torch.zeros(2, 20), ANCHORS)
    torch.testing.assert_close(boxes, torch.tensor([[4.0, 4, 12, 12], [8, 8, 24, 24]]))


def test_sides_are_left_top_right_bottom() -> None:
    # All mass on bin 1, 2, 3, 4 for the four sides; stride 2, centre (8, 8).
    outputs = torch.full((4, 5), -1e4)
    outputs[torch.arange(4), torch.arange(1, 5)] = 0
    boxes = build_gfl().decode_boxes(outputs.view(1, 20), ANCHORS[:1])
    torch.testing.assert_close(boxes, torch.tensor([[6.0, 4, 14, 16]]))


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, LN3], [0.0, 0.0]])
    losses = build_gfl().losses([logits, torch.zeros(2, 20)], TWO, 2.0)
    # IoU of the predictions: 1, and 128 / 256. So the classes have (s, y) = (1/2, 0), (3/4, 1) and
    # (1/2, 1/2), (1/2, 0).
    cls = LN2 / 4 + (1 / 4) ** 2 * -math.log(3 / 4) + 0 + LN2 / 4
    assert losses["loss_gfl_cls"].item() == pytest.approx(cls / 2)
    # Weights: the highest class scores, 3/4 and 1/2. 1 - GIoU: 0 and 1/2.
    assert losses["loss_gfl_loc"].item() == pytest.approx(2 * (0.5 * 0.5) / 1.25)
    # Cross-entropy ln 5 on each side, against whatever pair of bins.
    assert losses["loss_gfl_dfl"].item() == pytest.approx(0.25 * LN5)


def test_sum_of_weights_is_at_least_1() -> None:
    logits = torch.full((2, 2), -LN3)  # 1/4 each: sum 1/2
    losses = build_gfl().losses([logits, torch.zeros(2, 20)], TWO, 1.0)
    assert losses["loss_gfl_loc"].item() == pytest.approx(2 * 0.25 * 0.5)
    assert losses["loss_gfl_dfl"].item() == pytest.approx(0.25 * 0.5 * LN5)


def test_distribution_loss_trains_the_bins_around_the_distance() -> None:
    # Second box: its top is 8 px = 2 strides above the centre, its bottom on it (bin 0).
    outputs = torch.zeros(2, 20, requires_grad=True)
    model = build_gfl()
    model.losses([torch.zeros(2, 2), outputs], TWO, 1.0)["loss_gfl_dfl"].backward()
    assert outputs.grad is not None
    pulled = (outputs.grad[1].view(4, 5) < 0).long().argmax(dim=1)
    assert pulled.tolist() == [2, 2, 2, 0]


def test_box_weights_are_detached() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    losses = build_gfl().losses([logits, torch.zeros(2, 20, requires_grad=True)], TWO, 1.0)
    (losses["loss_gfl_loc"] + losses["loss_gfl_dfl"]).backward()
    assert logits.grad is None


def test_quality_target_is_detached() -> None:
    outputs = torch.zeros(2, 20, requires_grad=True)
    losses = build_gfl().losses([torch.zeros(2, 2, requires_grad=True), outputs], TWO, 1.0)
    losses["loss_gfl_cls"].backward()
    assert outputs.grad is None


def test_boxes_beyond_the_largest_distance_stay_finite() -> None:
    far = Positives(
        index=torch.tensor([0]),
        classes=torch.tensor([0]),
        boxes=torch.tensor([[-500.0, -500, 500, 500]]),
        anchors=ANCHORS[:1],
    )
    outputs = torch.zeros(1, 20, requires_grad=True)
    build_gfl().losses([torch.zeros(1, 2), outputs], far, 1.0)["loss_gfl_dfl"].backward()
    assert outputs.grad is not None
    pulled = (outputs.grad[0].view(4, 5) < 0).long().argmax(dim=1)
    assert pulled.tolist() == [4, 4, 4, 4]


def test_registered_and_head_shapes() -> None:
    model = build_gfl(reg_max=16)
    assert isinstance(model, META_ARCH_REGISTRY.get("GFL"))
    assert model.head.bbox_pred.out_channels == 4 * 17
    assert not any("quality" in name for name in model.state_dict())


@pytest.mark.parametrize("key", ["NUM_CONVS", "TOPK", "REG_MAX"])
def test_counts_below_1_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.GFL\.{key} is 0, expected at least 1"):
        build_tiny("gfl", f"MODEL.GFL.{key}", 0)


def test_anchors_have_a_size() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.GFL\.ANCHOR_SCALE is 0\.0, expected above 0"):
        build_tiny("gfl", "MODEL.GFL.ANCHOR_SCALE", 0.0)


def test_learns_two_images() -> None:
    model = build_gfl(reg_max=16)
    batch = two_images()
    totals = overfit(model, batch, steps=50)
    # The box losses first grow with the class scores that weigh them.
    assert totals[-1] < 0.4 * max(totals)
    model.eval()
    with torch.no_grad():
        results = model(batch)
    found = results[1]["instances"][:1]
    assert pairwise_iou(found.pred_boxes, batch[1]["instances"].gt_boxes).item() > 0.8
    assert found.pred_classes.tolist() == [1]
    # The score is the class score, trained to be the IoU.
    assert found.scores.item() > 0.6
