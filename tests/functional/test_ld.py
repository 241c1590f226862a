"""LD's losses and regions: the specification's vectors, slow loops, and the edge cases."""

import pytest
import torch
from torch import Tensor
from waves import assert_float32_whatever_autocast_says, random, wave

from kd_det.functional.atss import find_candidates
from kd_det.functional.boxes import anchors_at
from kd_det.functional.divergence import softmax_divergence
from kd_det.functional.ld import (
    MAIN_FACTOR,
    VLR_FACTOR,
    class_loss,
    find_regions,
    localization_loss,
)
from kd_det.functional.level_grid import Grid, grid_positions

ZS, ZT = wave((1, 2, 4, 5), 2, 0.31, 0), wave((1, 2, 4, 5), 2.5, 0.23, 0.4)
W = torch.tensor([[0.9, 0.4]], dtype=torch.float64)
V = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
CS, CT = wave((1, 3, 3), 2, 0.9, 0.2), wave((1, 3, 3), 3, 0.7, 1.1)
GRIDS = [Grid(6, 6, 8), Grid(3, 3, 16)]
ANCHORS = [
    anchors_at(grid_positions([grid]), torch.full((1, 2), 2.0 * grid.stride)) for grid in GRIDS
]
BOXES = torch.tensor([[5, 6, 28, 21], [20, 14, 46, 45]]).double()


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def main_loss(student: Tensor, weight: Tensor = W, num_images: int = 2) -> Tensor:
    return localization_loss(student, ZT, weight, factor=MAIN_FACTOR, num_images=num_images)


def loop_overlaps(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and DIoU of two boxes."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    iou = width * height / (sum(areas) - width * height)
    gap = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    return iou, iou - (gap[0] ** 2 + gap[1] ** 2) / (hull[0] ** 2 + hull[1] ** 2)


class TestLosses:
    def test_divergences_of_the_vectors(self) -> None:
        found = [softmax_divergence(ZS, ZT, tau=tau)[0, 0].tolist() for tau in (10, 1)]
        assert found[0] == near(0.000127995, 0.000090469, 0.000073512, 0.002827937)
        assert found[1] == near(0.009611351, 0.006813166, 0.003008355, 0.296742725)

    def test_regions_of_the_vectors(self) -> None:
        assert main_loss(ZS).item() == near(0.046474581)[0]
        assert main_loss(ZS, num_images=4).item() == near(0.023237291)[0]
        vlr = localization_loss(ZS, ZT, V, factor=VLR_FACTOR, num_images=2)
        assert vlr.item() == near(0.006004317)[0]

    def test_seventeen_bins(self) -> None:
        maps = wave((1, 1, 4, 17), 2, 0.31, 0), wave((1, 1, 4, 17), 2.5, 0.23, 0.4)
        one = torch.ones(1, 1, dtype=torch.float64)
        loss = localization_loss(*maps, one, factor=MAIN_FACTOR, num_images=2)
        assert loss.item() == near(0.141351138)[0]

    def test_classes_of_the_vectors(self) -> None:
        single = [class_loss(CS[:, [r]], CT[:, [r]], torch.ones(1, 1)).item() for r in range(3)]
        assert single == near(0.128373721, 0.002648023, 0.017616610)
        assert class_loss(CS, CT, torch.ones(1, 3)).item() == near(0.049546118)[0]
        some = torch.tensor([[True, False, True]])
        assert class_loss(CS, CT, some).item() == near((0.128373721 + 0.017616610) / 2)[0]

    def test_gradient_of_the_vectors(self) -> None:
        student = ZS.clone().requires_grad_()
        (grad,) = torch.autograd.grad(main_loss(student), student)
        found = [grad[0, 0, 0, 0].item(), grad[0, 1, 3, 4].item()]
        assert found == near(-0.001968194, 0.006845741)

    def test_localization_is_that_of_the_loop(self) -> None:
        student, teacher = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1)
        weight = random(2, 3, seed=2).clamp(min=0)
        total = 0.0
        for n in range(2):
            for r in range(3):
                for side in range(4):
                    q = (teacher[n, r, side] / 7).softmax(0)
                    p = (student[n, r, side] / 7).softmax(0)
                    total += float(weight[n, r] * 49 / 6 * (q * (q / p).log()).sum())
        loss = localization_loss(student, teacher, weight, factor=0.5, num_images=2, tau=7)
        assert loss.item() == pytest.approx(2 / 2 * 0.5 * total, rel=1e-10)

    def test_gradcheck(self) -> None:
        classes = CS.clone().requires_grad_()
        assert torch.autograd.gradcheck(main_loss, ZS.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda x: class_loss(x, CT, torch.ones(1, 3)), classes)

    def test_equal_logits_give_zero_and_a_number_more_changes_nothing(self) -> None:
        assert main_loss(ZT).item() == 0
        assert main_loss(ZT + 3).abs().item() < 1e-14
        assert class_loss(CT, CT, torch.ones(1, 3)).item() == 0

    def test_no_positive_gives_zero_on_the_graph(self) -> None:
        bins, classes = ZS.clone().requires_grad_(), CS.clone().requires_grad_()
        for loss, leaf in (
            (main_loss(bins, 0 * W), bins),
            (class_loss(classes, CT, torch.zeros(1, 3)), classes),
        ):
            assert loss.item() == 0
            (grad,) = torch.autograd.grad(loss, leaf)
            assert not grad.any()

    def test_twice_the_images_is_the_mean(self) -> None:
        twice = [torch.cat([x, x]) for x in (ZS, ZT, W)]
        loss = localization_loss(*twice, factor=MAIN_FACTOR, num_images=4)
        assert loss.item() == near(0.046474581)[0]

    def test_neither_weight_nor_teacher_gets_a_gradient(self) -> None:
        weight, teacher = W.clone().requires_grad_(), ZT.clone().requires_grad_()
        loss = localization_loss(ZS, teacher, weight, factor=1, num_images=2)
        assert not loss.requires_grad
        assert not class_loss(CS, CT.clone().requires_grad_(), torch.ones(1, 3)).requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_float32_under_autocast(self, dtype: torch.dtype) -> None:
        def bins(student: Tensor, teacher: Tensor) -> Tensor:
            weight = W.float()
            return localization_loss(student, teacher, weight, factor=1, num_images=2, tau=2)

        def classes(student: Tensor, teacher: Tensor) -> Tensor:
            return class_loss(student, teacher, torch.ones(1, 3))

        assert_float32_whatever_autocast_says(bins, ZS, ZT, dtype=dtype)
        assert_float32_whatever_autocast_says(classes, CS, CT, dtype=dtype)


class TestRegions:
    def test_vectors(self) -> None:
        candidates = find_candidates(ANCHORS, BOXES, topk=4)
        assert candidates.threshold.tolist() == near(0.483970622, 0.398168482)
        main, vlr = find_regions(ANCHORS, BOXES, topk=4)
        assert main.nonzero()[:, 0].tolist() == [7, 8, 41]
        expected = {
            9: 0.229038855, 13: 0.289699571, 14: 0.315098468, 15: 0.267303103,
            16: 0.267303103, 21: 0.317617866, 22: 0.317617866, 23: 0.177383592,
            27: 0.317617866, 28: 0.317617866, 36: 0.262915129, 37: 0.280636109,
            39: 0.220142602, 40: 0.396946565, 43: 0.297872340, 44: 0.337719298,
        }  # fmt: skip
        assert vlr.nonzero()[:, 0].tolist() == list(expected)
        assert vlr[list(expected)].tolist() == near(*expected.values())

    def test_vlr_is_that_of_the_loop(self) -> None:
        corners = 40 * random(6, 2).abs() / 2
        boxes = torch.cat([corners, corners + 4 + 12 * random(6, 2, seed=1).abs()], 1)
        thresholds = find_candidates(ANCHORS, boxes, topk=3).threshold.tolist()
        expected = []
        for anchor in torch.cat(ANCHORS).tolist():
            best = 0.0
            for box, threshold in zip(boxes.tolist(), thresholds, strict=True):
                iou, diou = loop_overlaps(anchor, box)
                if 0.25 * threshold <= diou < threshold:
                    best = max(best, iou)
            expected.append(best)
        assert max(expected) > 0
        assert find_regions(ANCHORS, boxes, topk=3).vlr.tolist() == pytest.approx(expected)

    def test_no_boxes_give_empty_regions(self) -> None:
        main, vlr = find_regions(ANCHORS, BOXES[:0])
        assert main.shape == vlr.shape == (45,)
        assert main.dtype == torch.bool and not main.any() and not vlr.any()

    def test_gamma_of_one_leaves_no_ring(self) -> None:
        assert not find_regions(ANCHORS, BOXES, topk=4, gamma=1.0).vlr.any()

    def test_one_candidate_has_no_deviation(self) -> None:
        """The threshold is that anchor's own IoU, its DIoU less: it lies in both regions."""
        anchor, box = torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[2.0, 2, 18, 18]])
        main, vlr = find_regions([anchor], box)
        iou = 196 / 316
        assert main.tolist() == [True]
        assert find_candidates([anchor], box).threshold.item() == pytest.approx(iou)
        assert vlr.tolist() == pytest.approx([iou])

    def test_anchors_are_boxes_around_their_positions(self) -> None:
        anchors = anchors_at(torch.tensor([[4.0, 12.0]]), torch.tensor([[16.0, 16.0], [8.0, 4.0]]))
        assert anchors.tolist() == [[-4, 4, 12, 20], [0, 10, 8, 14]]
