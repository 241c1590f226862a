"""IoU and GIoU: hand-computed values, gradients, empty boxes."""

import torch
from torch.autograd import gradcheck

from kd_det.functional.box_overlap import aligned_giou, aligned_iou

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
