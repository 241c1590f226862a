"""CrossKD's maths: the specification's vectors, a slow loop, and the edge cases."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from waves import assert_float32_whatever_autocast_says, random, wave

from kd_det.functional.bckd import classification_loss
from kd_det.functional.crosskd import (
    align_statistics,
    bin_loss,
    box_loss,
    quality_loss,
)
from kd_det.functional.divergence import softmax_divergence
from kd_det.functional.moments import Scope
from kd_det.functional.scores import confidence

FS, FT = wave((2, 2, 2, 3), 1, 0.4, 0.1), wave((2, 2, 2, 3), 2, 0.55, 0.7) + 0.5
WEIGHT, BIAS = wave((2, 2, 3, 3), 0.5, 0.3, 0.2), torch.tensor([-0.4, 0.1], dtype=torch.float64)
ZT = wave((1, 4, 3), 3, 0.7, 1.1)
B_HAT = torch.tensor([[[0, 0, 10, 10], [4, 3, 20, 14], [8, 8, 24, 40], [1, 1, 3, 9]]]).double()
B_T = torch.tensor([[[0, 0, 10, 10], [6, 2, 22, 16], [30, 8, 40, 40], [2, 0, 5, 8]]]).double()


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def head(features: Tensor) -> Tensor:
    return F.conv2d(features.relu(), WEIGHT, BIAS, padding=1)


def scores(maps: Tensor) -> Tensor:
    """(N, K, H, W) to (N, R, K)."""
    return maps.flatten(2).transpose(1, 2)


def cross_head_loss(student: Tensor) -> Tensor:
    predicted, own = head(align_statistics(student, FT)), head(FT)
    return classification_loss(scores(predicted), scores(own), normalizer=3)


def loop_align(student: Tensor, teacher: Tensor, scope: str, eps: float = 1e-6) -> Tensor:
    out = torch.zeros_like(student)
    groups = [slice(None)] if scope == "batch" else [slice(n, n + 1) for n in range(len(student))]
    for group in groups:
        for c in range(student.shape[1]):
            s, t = student[group, c], teacher[group, c]
            deviation = (s.var(correction=0) + eps).sqrt()
            target = (t.var(correction=0) + eps).sqrt()
            out[group, c] = (s - s.mean()) / deviation * target + t.mean()
    return out


def test_aligned_features_of_the_vectors() -> None:
    aligned = align_statistics(FS, FT)
    found = [aligned[0, 0, 0, 0].item(), aligned[1, 1, 1, 2].item()]
    assert found == near(1.294715946, -0.481011779)
    channel = aligned[:, 0]
    # The deviation of a + eps is that of the teacher + eps, up to 1e-6.
    assert channel.mean().item() == near(1.452661874)[0]
    assert channel.std(correction=0).item() == near(1.034018438)[0]


def test_cross_head_prediction_of_the_vectors() -> None:
    own, crossed = head(FT), head(align_statistics(FS, FT))
    found = [
        maps[index].item() for maps in (own, crossed) for index in ((0, 0, 0, 0), (1, 1, 1, 2))
    ]
    assert found == near(2.500467569, -1.028958448, 2.699223646, 1.541911307)


def test_classification_of_the_vectors() -> None:
    assert cross_head_loss(FS).item() == near(2.270967388)[0]
    assert cross_head_loss(FT).item() < 1e-15
    assert cross_head_loss(4 * FT - 3).item() == pytest.approx(2.4e-7, rel=0.03)


def test_gradient_of_the_vectors() -> None:
    student = FS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_head_loss(student), student)
    assert [grad[0, 0, 0, 0].item(), grad[1, 1, 1, 2].item()] == near(-0.098425070, -0.164358448)
    assert grad.sum((0, 2, 3)).abs().max().item() < 1e-15


def test_confidence_and_boxes_of_the_vectors() -> None:
    w = confidence(ZT)
    assert w[0].tolist() == near(0.948901162, 0.456330939, 0.771102987, 0.948322367)
    assert box_loss(B_HAT, B_T, w, normalizer=3).item() == near(0.641133370)[0]


def test_bins_of_the_vectors() -> None:
    predicted, own = wave((1, 2, 4, 5), 2, 0.31, 0), wave((1, 2, 4, 5), 2.5, 0.23, 0.4)
    w = confidence(ZT)[:, :2]
    assert w.sum().item() == near(1.405232101)[0]
    loss = bin_loss(predicted, own, w, total_weight=w.sum())
    assert loss.item() == near(0.169879075)[0]
    assert bin_loss(own + 3, own, w, total_weight=1).item() < 1e-15


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_alignment_is_that_of_the_loop(scope: Scope) -> None:
    student, teacher = random(3, 4, 3, 5), 2 + 3 * random(3, 4, 3, 5, seed=1)
    aligned = align_statistics(student, teacher, scope=scope)
    torch.testing.assert_close(aligned, loop_align(student, teacher, scope))


def test_bins_are_those_of_the_loop() -> None:
    predicted, own, w = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1), random(2, 3, seed=2).abs()
    total = 0.0
    for n in range(2):
        for r in range(3):
            for side in range(4):
                q = own[n, r, side].exp() / own[n, r, side].exp().sum()
                p = predicted[n, r, side].exp() / predicted[n, r, side].exp().sum()
                total += float(w[n, r] * (q * (q / p).log()).sum())
    loss = bin_loss(predicted, own, w, total_weight=2.5)
    assert loss.item() == pytest.approx(total / 4 / 2.5, rel=1e-12)


def test_boxes_of_fcos() -> None:
    """-log(IoU), with IoU 1, 0.626, 0 (taken as eps) and 0.212."""
    expected = -(math.log(77 / 123) + math.log(1e-6) + math.log(7 / 33))
    loss = box_loss(B_HAT, B_T, torch.ones(1, 4), normalizer=2, distance="log_iou")
    assert loss.item() == pytest.approx(expected / 2)
    boxes = B_HAT.clone().requires_grad_()
    loss = box_loss(boxes, B_T, torch.ones(1, 4), normalizer=2, distance="log_iou")
    (grad,) = torch.autograd.grad(loss, boxes)
    assert torch.isfinite(grad).all() and not grad[0, 2].any()


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_gradcheck_of_the_alignment(scope: Scope) -> None:
    student = random(2, 2, 2, 3).requires_grad_()
    teacher, weight = random(2, 2, 2, 3, seed=1), random(2, 2, 2, 3, seed=2)

    def loss(x: Tensor) -> Tensor:
        return (align_statistics(x, teacher, scope=scope) * weight).sum()

    assert torch.autograd.gradcheck(loss, student)


def test_gradcheck_of_the_losses() -> None:
    assert torch.autograd.gradcheck(cross_head_loss, FS.clone().requires_grad_())
    bins, own, w = random(1, 2, 4, 5).requires_grad_(), random(1, 2, 4, 5, seed=1), torch.ones(1, 2)
    assert torch.autograd.gradcheck(lambda x: bin_loss(x, own, w.double(), total_weight=2), bins)
    boxes = (B_HAT[:, 1:2] + 0.3).requires_grad_()
    for distance in ("giou", "log_iou"):
        assert torch.autograd.gradcheck(
            lambda x, d=distance: box_loss(x, B_T[:, 1:2], w[:, :1], normalizer=2, distance=d),
            boxes,
        )


def test_a_dead_channel_becomes_the_teachers_mean_without_gradient() -> None:
    student = FS.clone()
    student[:, 1] = 0.7
    student.requires_grad_()
    aligned = align_statistics(student, FT)
    torch.testing.assert_close(aligned[:, 1], FT[:, 1].mean().expand_as(aligned[:, 1]))
    (grad,) = torch.autograd.grad((aligned * FT).sum(), student)
    assert not grad[:, 1].any() and grad[:, 0].any()


def test_one_cell_is_the_teachers_value() -> None:
    student, teacher = FS[:1, :, :1, :1], FT[:1, :, :1, :1]
    torch.testing.assert_close(align_statistics(student, teacher), teacher)


def test_statistics_of_unmasked_cells_alone() -> None:
    mask = torch.ones(2, 1, 2, 3).double()
    mask[..., 2] = 0
    expected = align_statistics(FS[..., :2], FT[..., :2])
    junk = FS.clone(), FT.clone()
    for x in junk:
        x[..., 2] = 1e3
    torch.testing.assert_close(align_statistics(*junk, mask=mask)[..., :2], expected)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = FT.clone().requires_grad_()
    assert not align_statistics(FS, teacher).requires_grad
    assert not confidence(teacher).requires_grad
    bins = random(1, 2, 4, 5).requires_grad_()
    assert not softmax_divergence(bins.detach(), bins).requires_grad


def test_quality_by_hand() -> None:
    """CE(0.5, 1 / 3) = (ln 3 + ln 1.5) / 2; the second position does not count."""
    predicted, own = torch.tensor([[-math.log(2.0), 3.0]]), torch.zeros(1, 2)
    weight = torch.tensor([[1.0, 0.0]])
    found = quality_loss(predicted, own, weight, normalizer=4)
    assert found.item() == pytest.approx((math.log(3) + math.log(1.5)) / 2 / 4)
    predicted = wave((2, 3), 1, 0.7, 0).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: quality_loss(x, wave((2, 3), 2, 0.3, 1), torch.ones(2, 3), normalizer=2),
        predicted,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    def aligned(student: Tensor, teacher: Tensor) -> Tensor:
        return align_statistics(student, teacher).square().sum()

    def bins(student: Tensor, teacher: Tensor) -> Tensor:
        return bin_loss(student, teacher, torch.ones(1, 2), total_weight=2)

    def boxes(student: Tensor, teacher: Tensor) -> Tensor:
        return box_loss(student, teacher, torch.ones(1, 4), normalizer=2)

    assert_float32_whatever_autocast_says(aligned, FS, FT, dtype=dtype)
    logits = wave((1, 2, 4, 5), 2, 0.31, 0), wave((1, 2, 4, 5), 2.5, 0.23, 0.4)
    assert_float32_whatever_autocast_says(bins, *logits, dtype=dtype)
    assert_float32_whatever_autocast_says(boxes, B_HAT, B_T, dtype=dtype)

    def quality(student: Tensor, teacher: Tensor) -> Tensor:
        return quality_loss(student, teacher, torch.ones(2, 3), normalizer=2)

    logits = wave((2, 3), 2, 0.31, 0), wave((2, 3), 2.5, 0.23, 0.4)
    assert_float32_whatever_autocast_says(quality, *logits, dtype=dtype)


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="distance is 'iou', expected 'giou' or 'log_iou'"):
        box_loss(B_HAT, B_T, torch.ones(1, 4), normalizer=1, distance="iou")  # type: ignore[arg-type]
