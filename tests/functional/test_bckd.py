"""BCKD's losses: the specification's vectors, a slow loop, and the edge cases."""

import math

import pytest
import torch
from torch import Tensor
from waves import assert_float32_whatever_autocast_says, random, wave

from kd_det.functional.bckd import classification_loss, localization_loss
from kd_det.functional.boxes import aligned_giou, aligned_iou
from kd_det.functional.scores import score_gap

ZS, ZT = wave((1, 4, 3), 2, 0.9, 0.2), wave((1, 4, 3), 3, 0.7, 1.1)
BS = torch.tensor([[[0, 0, 10, 10], [4, 3, 20, 14], [8, 8, 24, 40], [1, 1, 3, 9]]]).double()
BT = torch.tensor([[[0, 0, 10, 10], [6, 2, 22, 16], [30, 8, 40, 40], [2, 0, 5, 8]]]).double()
GAP = score_gap(ZS, ZT)


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop_overlap(a: list[float], b: list[float], generalised: bool) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    union = sum(areas) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - ((hull - union) / hull if generalised else 0)


def loop(
    logits: tuple[Tensor, Tensor], boxes: tuple[Tensor, Tensor], valid: Tensor, beta: float
) -> list[float]:
    """L_cls, L_loc with GIoU and with IoU, at N+ = 1: one position and class at a time."""
    total = [0.0, 0.0, 0.0]
    for n, r in valid.nonzero().tolist():
        gaps = []
        for x, z in zip(*(v[n, r].tolist() for v in logits), strict=True):
            p, q = sigmoid(x), sigmoid(z)
            gaps.append(abs(p - q))
            total[0] += gaps[-1] ** beta * -(q * math.log(p) + (1 - q) * math.log(1 - p))
        pair = [v[n, r].tolist() for v in boxes]
        for i, generalised in ((1, True), (2, False)):
            total[i] += max(gaps) * (1 - loop_overlap(*pair, generalised))
    return total


def test_gap_and_overlaps_of_the_vectors() -> None:
    assert GAP[0].tolist() == near(0.337404006, 0.161062354, 0.304026750, 0.629875433)
    assert aligned_iou(BS, BT)[0].tolist() == near(1, 0.626016260, 0, 0.212121212)
    assert aligned_giou(BS, BT)[0].tolist() == near(1, 0.602206736, -0.1875, 0.128787879)


def test_losses_of_the_vectors() -> None:
    assert classification_loss(ZS, ZT, normalizer=2).item() == near(0.877815546)[0]
    assert classification_loss(ZS, ZT, normalizer=2, beta=2).item() == near(0.379251422)[0]
    assert localization_loss(BS, BT, GAP, normalizer=2).item() == near(0.486928198)[0]
    iou = localization_loss(BS, BT, GAP, normalizer=2, overlap="iou")
    assert iou.item() == near(0.430263472)[0]


def test_an_invalid_position_does_not_count() -> None:
    valid = torch.tensor([[True, False, True, True]])
    found = [
        classification_loss(ZS, ZT, normalizer=2, valid=valid).item(),
        localization_loss(BS, BT, GAP, normalizer=2, valid=valid).item(),
    ]
    assert found == near(0.787431149, 0.454893439)


def test_a_student_like_its_teacher_and_one_shifted_by_two() -> None:
    logits = ZT.clone().requires_grad_()
    loss = classification_loss(logits, ZT, normalizer=2)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert localization_loss(BT, BT, score_gap(ZT, ZT), normalizer=2).item() == 0
    assert classification_loss(ZT + 2, ZT, normalizer=2).item() == near(0.894844009)[0]
    assert localization_loss(BT, BT, score_gap(ZT + 2, ZT), normalizer=2).item() == 0


def test_gradients_of_the_vectors() -> None:
    logits, boxes = ZS.clone().requires_grad_(), BS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(classification_loss(logits, ZT, normalizer=2), logits)
    found = [grad[0, 0, 0].item(), grad[0, 1, 1].item(), grad[0, 3, 2].item()]
    assert found == near(-0.121792837, 0.041316927, -0.312413285)
    loss = localization_loss(boxes, BT, score_gap(logits, ZT), normalizer=2)
    (grad,) = torch.autograd.grad(loss, boxes)
    assert grad[0, 1].tolist() == near(-0.003106459, 0.004812343, -0.003600988, -0.004812343)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_parity_with_the_loop(beta: float) -> None:
    logits = 2 * random(2, 5, 3), 2 * random(2, 5, 3, seed=1)
    boxes = []
    for seed in (2, 3):
        corner, size = 10 * random(2, 5, 2, seed=seed), 1 + 9 * random(2, 5, 2, seed=seed + 2).abs()
        boxes.append(torch.cat([corner, corner + size], -1))
    valid = random(2, 5, seed=6) > -0.5
    gap = score_gap(*logits)
    found = [
        classification_loss(*logits, normalizer=1, beta=beta, valid=valid),
        localization_loss(*boxes, gap, normalizer=1, valid=valid),
        localization_loss(*boxes, gap, normalizer=1, valid=valid, overlap="iou"),
    ]
    expected = loop(logits, (boxes[0], boxes[1]), valid, beta)
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-9)


def test_gradcheck_away_from_equality() -> None:
    logits, boxes = ZS.clone().requires_grad_(), (BS + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, ZT, normalizer=2), logits)
    assert torch.autograd.gradcheck(lambda x: localization_loss(x, BT, GAP, normalizer=2), boxes)


def test_no_valid_position_gives_zero_on_the_graph() -> None:
    logits, boxes = ZS.clone().requires_grad_(), BS.clone().requires_grad_()
    nothing = torch.zeros(1, 4)
    for loss, leaf in (
        (classification_loss(logits, ZT, normalizer=1, valid=nothing), logits),
        (localization_loss(boxes, BT, GAP, normalizer=1, valid=nothing), boxes),
    ):
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, leaf)
        assert not grad.any()


@pytest.mark.parametrize("overlap", ["giou", "iou"])
def test_boxes_without_area_stay_between_zero_and_two(overlap: str) -> None:
    point = torch.tensor([[[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0]]])
    other = torch.tensor([[[5.0, 5.0, 5.0, 5.0], [50.0, 5.0, 60.0, 9.0]]])
    loss = localization_loss(point, other, torch.ones(1, 2), normalizer=1, overlap=overlap)
    assert 0 <= loss.item() <= 4


def test_the_classifier_learns_nothing_from_the_boxes() -> None:
    assert not score_gap(ZS.clone().requires_grad_(), ZT).requires_grad


def test_the_teacher_gets_no_gradient() -> None:
    logits, boxes = ZT.clone().requires_grad_(), BT.clone().requires_grad_()
    assert not classification_loss(ZS, logits, normalizer=1).requires_grad
    assert not localization_loss(BS, boxes, score_gap(ZS, logits), normalizer=1).requires_grad


def test_a_normaliser_on_the_device_is_as_good_as_a_number() -> None:
    loss = classification_loss(ZS, ZT, normalizer=torch.tensor(2.0).double())
    assert loss.item() == near(0.877815546)[0]


def test_an_image_alone_gives_its_part_of_the_sum() -> None:
    logits = torch.cat([ZS, ZS + 1]), torch.cat([ZT, ZT - 1])
    alone = [classification_loss(*(x[n : n + 1] for x in logits), normalizer=3) for n in range(2)]
    assert classification_loss(*logits, normalizer=3).item() == near(sum(alone).item())[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    def cls(student: Tensor, teacher: Tensor) -> Tensor:
        return classification_loss(student, teacher, normalizer=2)

    def loc(student: Tensor, teacher: Tensor) -> Tensor:
        return localization_loss(student, teacher, GAP.to(torch.float32), normalizer=2)

    assert_float32_whatever_autocast_says(cls, ZS, ZT, dtype=dtype)
    assert_float32_whatever_autocast_says(loc, BS, BT, dtype=dtype)


def test_an_unknown_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap is 'diou', expected 'giou' or 'iou'"):
        localization_loss(BS, BT, GAP, normalizer=1, overlap="diou")  # type: ignore[arg-type]
