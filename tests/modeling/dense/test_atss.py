"""ATSS: assignment by hand and against a loop, losses by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from tiny_dense import CLASSES, build_tiny, losses_of, make_image, no_objects
from torch import Tensor

from kd_det.functional.atss import atss_assign
from kd_det.modeling.dense.atss_assigner import Positives, find_positives

LN2 = math.log(2)


def square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


# A row of 4 anchors of side 4, and a row of 2 of side 8.
FINE = torch.tensor([square(x, 2, 4) for x in (2, 6, 10, 14)])
COARSE = torch.tensor([square(x, 4, 8) for x in (4, 12)])


def test_assignment_by_hand() -> None:
    # Box [0, 0, 4, 4], centre (2, 2), k = 2.
    # Fine: anchors 0 and 1 (distances 0, 4), IoU 1 and 0. Coarse: both, IoU 16/64 = 1/4 and 0.
    # Mean 5/16 = 0.3125; squared deviations sum to 0.671875, divided by 3: deviation 0.4732.
    # Threshold 0.786: anchor 0 alone.
    matched = atss_assign([FINE, COARSE], torch.tensor([[0.0, 0, 4, 4]]), topk=2)
    assert matched.tolist() == [0, -1, -1, -1, -1, -1]


def test_the_level_is_chosen_by_overlap() -> None:
    # Box [0, 0, 8, 8], centre (4, 4). Fine: anchors 0 and 1, IoU 1/4 each. Coarse: IoU 1 and 0.
    # Mean 3/8; deviation sqrt((2 (1/8)^2 + (5/8)^2 + (3/8)^2) / 3) = 0.433. Threshold 0.808.
    matched = atss_assign([FINE, COARSE], torch.tensor([[0.0, 0, 8, 8]]), topk=2)
    assert matched.tolist() == [-1, -1, -1, -1, 0, -1]


def test_deviation_has_the_divisor_n_minus_1() -> None:
    # One level, k = 4; box [0, 0, 7.8, 4] of area 31.2. IoU 16/31.2 = 0.513, 15.2/32 = 0.475, 0,
    # 0. Mean 0.247, squared deviations sum to 0.2446. Divided by 3, the threshold is 0.5325 and
    # nothing is positive. Divided by 4, it would be 0.494 and the first anchor positive.
    matched = atss_assign([FINE], torch.tensor([[0.0, 0, 7.8, 4]]), topk=4)
    assert matched.tolist() == [-1, -1, -1, -1]


def test_the_centre_must_lie_strictly_inside() -> None:
    # Box [5, 0, 12, 8], centre (8.5, 4), k = 1: the coarse anchor at (12, 4), on the border.
    on_border = torch.tensor([[5.0, 0, 12, 8]])
    assert atss_assign([COARSE], on_border, topk=1).tolist() == [-1, -1]
    wider = torch.tensor([[5.0, 0, 12.5, 8]])
    assert atss_assign([COARSE], wider, topk=1).tolist() == [-1, 0]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_anchor_goes_to_the_box_it_overlaps_most(order: list[int]) -> None:
    # With k = 1 both boxes choose the coarse anchor [8, 0, 16, 8]: IoU 1 and 36/64.
    boxes = torch.tensor([[8.0, 0, 16, 8], [9.0, 1, 15, 7]])[order]
    assert atss_assign([COARSE], boxes, topk=1).tolist() == [-1, order.index(0)]


def test_candidates_of_equal_overlap_are_all_positive() -> None:
    # The box contains all 9 anchors: mean = IoU of each, deviation 0, whatever the rounding.
    anchors = torch.tensor([square(x, y, 8) for y in (4, 12, 20) for x in (4, 12, 20)])
    for side in range(30, 90):
        box = torch.tensor([square(12, 12, side * 1.01)])
        assert (atss_assign([anchors], box) == 0).all(), side


def test_a_level_with_fewer_anchors_gives_all() -> None:
    matched = atss_assign([FINE, COARSE], torch.tensor([[8.0, 0, 16, 8]]), topk=9)
    assert matched.tolist() == [-1, -1, -1, -1, -1, 0]


def test_no_boxes_no_positives() -> None:
    assert atss_assign([FINE, COARSE], torch.zeros(0, 4)).tolist() == [-1] * 6


def assign_with_loops(levels: list[Tensor], boxes: Tensor, k: int) -> list[int]:
    """Algorithm 1 of the paper, box by box, in numpy."""
    anchors = torch.cat(levels).numpy().astype(np.float64)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    matched, overlap = [-1] * len(anchors), [0.0] * len(anchors)
    for g, box in enumerate(boxes.numpy().astype(np.float64)):
        chosen, start = [], 0
        for level in levels:
            ids = range(start, start + len(level))
            middle = (box[:2] + box[2:]) / 2
            chosen += sorted(ids, key=lambda a, m=middle: np.linalg.norm(centers[a] - m))[:k]
            start += len(level)
        ious = []
        for a in chosen:
            width = min(anchors[a, 2], box[2]) - max(anchors[a, 0], box[0])
            height = min(anchors[a, 3], box[3]) - max(anchors[a, 1], box[1])
            common = max(width, 0) * max(height, 0)
            area = np.prod(anchors[a, 2:] - anchors[a, :2]) + np.prod(box[2:] - box[:2])
            ious.append(common / (area - common))
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for a, iou in zip(chosen, ious, strict=True):
            inside = (centers[a] > box[:2]).all() and (centers[a] < box[2:]).all()
            if iou >= threshold and inside and iou > overlap[a]:
                matched[a], overlap[a] = g, iou
    return matched


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    sides = 6 + torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + sides], dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_against_loops(seed: int) -> None:
    levels = [
        torch.tensor([square(x * s, y * s, 8 * s) for y in range(96 // s) for x in range(96 // s)])
        for s in (8, 16, 32)
    ]
    boxes = random_boxes(12, seed)
    expected = assign_with_loops(levels, boxes, 9)
    assert max(expected) >= 0, "the case must have positives"
    assert atss_assign(levels, boxes).tolist() == expected


def test_positives_of_a_batch() -> None:
    # Image 0: no box. Image 1: its box -> coarse anchor 1. Image 2: its box -> fine anchor 0.
    boxes = [torch.zeros(0, 4), torch.tensor([[8.0, 0, 16, 8]]), torch.tensor([[0.0, 0, 4, 4]])]
    classes = [torch.zeros(0, dtype=torch.int64), torch.tensor([7]), torch.tensor([5])]
    found = find_positives([FINE, COARSE], boxes, classes, topk=2)
    assert found.index.tolist() == [6 + 5, 12 + 0]
    assert found.classes.tolist() == [7, 5]
    assert torch.equal(found.boxes, torch.cat(boxes))
    assert torch.equal(found.anchors, torch.stack([COARSE[1], FINE[0]]))


# Two positives of two anchors. Zero box outputs decode to the anchor [0, 0, 8, 8] itself.
TWO = Positives(
    index=torch.tensor([0, 1]),
    classes=torch.tensor([1, 0]),
    boxes=torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 16]]),
    anchors=torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8]]),
)


def test_losses_with_centerness_by_hand() -> None:
    flat = [torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(2, 1)]
    losses = build_tiny("atss").losses(flat, TWO, 2.0)
    # Probability 1/2 everywhere: 2 positives (1/4 alpha) and 2 negatives, (1/2)^2 ln 2 each.
    cls = (2 * 0.25 + 2 * 0.75) * 0.25 * LN2
    assert losses["loss_atss_cls"].item() == pytest.approx(cls / 2)
    # Centerness 1 and sqrt(1 * 4/12); 1 - GIoU is 0 and 1/2.
    weight = math.sqrt(1 / 3)
    assert losses["loss_atss_loc"].item() == pytest.approx(2 * weight * 0.5 / (1 + weight))
    # Quality 1/2: cross-entropy ln 2 against any target.
    assert losses["loss_atss_quality"].item() == pytest.approx(2 * LN2 / 2)


@pytest.mark.parametrize(
    ("branch", "loc"), [("iou", (0 + 0.5) / 2), ("iou_weighted", (0 + 0.5 * 0.5) / 1.5)]
)
def test_losses_with_iou_by_hand(branch: str, loc: float) -> None:
    quality = torch.full((2, 1), math.log(3))  # 3/4
    flat = [torch.zeros(2, 2), torch.zeros(2, 4), quality]
    losses = build_tiny("atss", "MODEL.ATSS.QUALITY_BRANCH", branch).losses(flat, TWO, 1.0)
    # IoU targets 1 and 1/2; 1 - GIoU is 0 and 1/2.
    assert losses["loss_atss_loc"].item() == pytest.approx(2 * loc)
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    expected = right + (0.5 * right + 0.5 * wrong)
    assert losses["loss_atss_quality"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("branch", "share"), [("iou", 1 / 2), ("iou_weighted", 1 / 17)])
def test_a_badly_placed_box_moves_as_much_as_a_good_one(branch: str, share: float) -> None:
    # IoU 1, and a box of 8 x 8 in the middle of one of 32 x 32: IoU = GIoU = w h / 1024 = 1/16.
    positives = replace(TWO, boxes=torch.tensor([[0.0, 0, 8, 8], [-12, -12, 20, 20]]))
    outputs = torch.zeros(2, 4, requires_grad=True)
    model = build_tiny("atss", "MODEL.ATSS.QUALITY_BRANCH", branch)
    flat = [torch.zeros(2, 2), outputs, torch.zeros(2, 1)]
    loss = model.losses(flat, positives, 1.0)["loss_atss_loc"]
    assert loss.item() == pytest.approx(2 * share * 15 / 16)
    loss.backward()
    assert outputs.grad is not None
    # w = 8 exp(dw / 5), so dIoU / d(dw) = IoU / 5; nothing pulls at the centre.
    gradient = -2 * share * (1 / 16) / 5
    assert outputs.grad[1].tolist() == pytest.approx([0, 0, gradient, gradient], abs=1e-7)


def test_registered_and_named_like_retinanet() -> None:
    model = build_tiny("atss")
    assert isinstance(model, META_ARCH_REGISTRY.get("ATSS"))
    parts = {name.split(".")[1] for name, _ in model.named_parameters() if "head." in name}
    names = {"cls_subnet", "bbox_subnet", "cls_score", "bbox_pred", "quality", "scales"}
    assert parts == names
    assert model.head.cls_score.out_channels == CLASSES


def test_each_level_has_its_own_scale() -> None:
    model = build_tiny("atss").eval()
    features = [torch.ones(1, 16, 4, 4)] * 3
    with torch.no_grad():
        model.head.bbox_pred.bias.fill_(1.0)
        for i, scale in enumerate(model.head.scales):
            scale.fill_(float(i))
        boxes = model.head(features)[1]
    assert boxes[1].abs().min() > 0
    torch.testing.assert_close(boxes[2], 2 * boxes[1])
    assert not boxes[0].any()


def test_normaliser_is_a_moving_average() -> None:
    model = build_tiny("atss")
    losses_of(model, [no_objects()])
    assert model.loss_normalizer == pytest.approx(0.9 * 100 + 0.1 * 1)


def test_score_is_the_root_of_class_times_quality() -> None:
    model = build_tiny("atss")
    scores = model.scores(torch.tensor([[0.5, 0.125]]), torch.tensor([[0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.25]]))


def test_unknown_quality_branch() -> None:
    with pytest.raises(
        ValueError, match=r"QUALITY_BRANCH is 'ctr', expected one of centerness, iou, iou_weighted"
    ):
        build_tiny("atss", "MODEL.ATSS.QUALITY_BRANCH", "ctr")


def test_image_is_not_changed_by_its_neighbours() -> None:
    model = build_tiny("atss").eval()
    alone = make_image([[4, 4, 40, 36]], [0])
    with torch.no_grad():
        model.head.cls_score.bias.fill_(0.0)
        single = model([alone])[0]["instances"]
        pair = model([no_objects(), alone])[1]["instances"]
    assert len(single) > 0
    torch.testing.assert_close(single.scores, pair.scores)
