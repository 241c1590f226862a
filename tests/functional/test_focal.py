"""GFL's losses: hand-computed values, minima, gradients, half precision."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from kd_det.functional.focal import (
    distribution_focal_loss,
    distribution_mean,
    quality_focal_loss,
)

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4


def test_quality_focal_loss_by_hand() -> None:
    # (y, s): (1, 3/4), (0, 3/4), (1/2, 1/4).
    logits = torch.tensor([LN3, LN3, -LN3])
    targets = torch.tensor([1.0, 0.0, 0.5])
    expected = [
        (1 / 4) ** 2 * -math.log(3 / 4),
        (3 / 4) ** 2 * -math.log(1 / 4),
        (1 / 4) ** 2 * -(0.5 * math.log(3 / 4) + 0.5 * math.log(1 / 4)),
    ]
    torch.testing.assert_close(quality_focal_loss(logits, targets), torch.tensor(expected))


def test_quality_focal_loss_beta_is_the_exponent() -> None:
    logits, targets = torch.tensor([LN3]), torch.tensor([0.0])
    ratio = quality_focal_loss(logits, targets, 3.0) / quality_focal_loss(logits, targets, 1.0)
    assert ratio.item() == pytest.approx((3 / 4) ** 2)


def test_quality_focal_loss_is_zero_at_the_target_and_positive_beside_it() -> None:
    targets = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    logits = targets.logit()
    assert quality_focal_loss(logits, targets).abs().max() < 1e-12
    for step in (-0.5, 0.5):
        assert (quality_focal_loss(logits + step, targets) > 1e-4).all()


def test_quality_focal_loss_survives_extreme_logits() -> None:
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([1.0, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([200.0, 200.0]))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([-1.0, 1.0]))


def test_distribution_focal_loss_by_hand() -> None:
    # P = (1/6, 2/6, 3/6) on the bins 0, 1, 2.
    logits = torch.tensor([1.0, 2.0, 3.0]).log().expand(4, 3)
    targets = torch.tensor([0.0, 0.25, 1.5, 2.0])
    p = [math.log(1 / 6), math.log(2 / 6), math.log(3 / 6)]
    expected = [-p[0], -(0.75 * p[0] + 0.25 * p[1]), -(0.5 * p[1] + 0.5 * p[2]), -p[2]]
    torch.testing.assert_close(distribution_focal_loss(logits, targets), torch.tensor(expected))


def test_distribution_focal_loss_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 8, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 7
    loss = distribution_focal_loss(logits, targets)
    for i in range(5):
        for side in range(4):
            p, y = logits[i, side].softmax(0), targets[i, side].item()
            low = int(y)
            expected = -((low + 1 - y) * p[low].log() + (y - low) * p[low + 1].log())
            assert loss[i, side].item() == pytest.approx(expected.item())


def test_distribution_focal_loss_is_smallest_when_the_mean_is_the_target() -> None:
    target = torch.tensor([1.25], dtype=torch.float64)
    best = torch.tensor([[1e-9, 0.75, 0.25, 1e-9]], dtype=torch.float64).log().requires_grad_()
    distribution_focal_loss(best, target).sum().backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-8
    assert distribution_mean(best).item() == pytest.approx(1.25)


def test_distribution_mean_by_hand() -> None:
    logits = torch.stack([torch.zeros(5), torch.tensor([-1e4, -1e4, -1e4, 0.0, 0.0])])
    torch.testing.assert_close(distribution_mean(logits), torch.tensor([2.0, 3.5]))


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    quality = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    distance = torch.rand(3, generator=generator, dtype=torch.float64) * 4
    assert gradcheck(lambda x: quality_focal_loss(x, quality), (logits,))
    assert gradcheck(lambda x: distribution_focal_loss(x, distance), (logits,))
    assert gradcheck(distribution_mean, (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype)
    full = logits.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = distribution_mean(logits)
        dfl = distribution_focal_loss(logits, torch.tensor([1.3]))
        qfl = quality_focal_loss(logits, torch.full_like(logits, 0.5))
    assert mean.dtype == dfl.dtype == qfl.dtype == torch.float32
    torch.testing.assert_close(mean, distribution_mean(full))
    torch.testing.assert_close(dfl, distribution_focal_loss(full, torch.tensor([1.3])))
    torch.testing.assert_close(qfl, quality_focal_loss(full, torch.full_like(full, 0.5)))
