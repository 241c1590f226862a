"""Centres, insides, IoU and GIoU: hand-computed values, gradients, empty boxes."""

import torch
from torch.autograd import gradcheck

from kd_det.functional.boxes import (
    aligned_giou,
    aligned_iou,
    box_centers,
    centerness,
    strictly_inside,
)

#                  equal           half           apart            touching corner
BOXES = [[0, 0, 2, 2.0], [0, 0, 2, 1.0], [0, 0, 1, 1.0], [0, 0, 1, 1.0]]
OTHERS = [[0, 0, 2, 2.0], [0, 0, 2, 2.0], [3, 0, 4, 1.0], [1, 1, 2, 2.0]]


def test_iou_by_hand() -> None:
    iou = aligned_iou(torch.tensor(BOXES), torch.tensor(OTHERS))
    torch.testing.assert_close(iou, torch.tensor([1.0, 0.5, 0.0, 0.0]))


def test_giou_by_hand() -> None:
    # Third: union 2 in an enclosing 4 x 1. Fourth: union 2 in an enclosing 2 x 2.
    giou = aligned_giou(torch.tensor(BOXES), torch.tensor(OTHERS))
    torch.testing.assert_close(giou, torch.tensor([1.0, 0.5, -0.5, -0.5]))


def test_giou_never_waits_for_the_device() -> None:
    """The backward pass of `prod`, say, asks for the number of zeros."""
    boxes = torch.tensor(BOXES, requires_grad=True)
    with torch.profiler.profile() as profile:
        aligned_giou(boxes, torch.tensor(OTHERS)).sum().backward()
    names = {event.name for event in profile.events()}
    assert "aten::minimum" in names and "aten::item" not in names


def test_empty_boxes_have_no_overlap() -> None:
    empty = torch.tensor([[1.0, 1, 1, 1]])
    assert aligned_iou(empty, empty).item() == 0
    assert aligned_giou(empty, empty).item() == 0


def test_broadcasting_gives_all_pairs() -> None:
    boxes, others = torch.tensor(BOXES), torch.tensor(OTHERS)
    pairs = aligned_iou(boxes[:, None], others)
    assert pairs.shape == (4, 4)
    for i in range(4):
        torch.testing.assert_close(pairs[i], aligned_iou(boxes[i].expand(4, 4), others))


def test_gradients_in_float64() -> None:
    boxes = torch.tensor([[0, 0, 2, 1.1], [0, 0, 1, 1.2]], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[0.3, 0.2, 2.5, 2], [3, 0.1, 4, 1]], dtype=torch.float64)
    assert gradcheck(lambda x: aligned_giou(x, others), (boxes,))
    assert gradcheck(lambda x: aligned_iou(x, others), (boxes,))


def test_centers() -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 8]], [[-2, 1, 1, 1]]])
    assert box_centers(boxes).tolist() == [[[2, 4]], [[-0.5, 1]]]


def test_a_point_on_a_side_is_outside() -> None:
    box = torch.tensor([0.0, 0, 8, 4])
    points = torch.tensor([[4.0, 2], [0, 2], [8, 2], [4, 0], [4, 4], [7.9999, 1e-4], [9, 2]])
    expected = [True, False, False, False, False, True, False]
    assert strictly_inside(points, box).tolist() == expected
    assert strictly_inside(points.double(), box.double()).tolist() == expected


def test_broken_boxes_hold_no_point() -> None:
    nan = float("nan")
    boxes = torch.tensor([[nan, 0, 8, 8], [0, 0, 8, nan], [8, 0, 0, 8], [8, 8, 0, 0]])
    assert not strictly_inside(torch.tensor([4.0, 4.0]), boxes).any()


def test_centerness_by_hand() -> None:
    # Point (1, 3) in [0, 0, 4, 4]: sqrt(1/3 * 1/3); the middle; a side.
    points = torch.tensor([[1.0, 3], [2, 2], [4, 2]])
    value = centerness(points, torch.tensor([[0.0, 0, 4, 4]]).expand(3, 4))
    torch.testing.assert_close(value, torch.tensor([1 / 3, 1.0, 0.0]))
