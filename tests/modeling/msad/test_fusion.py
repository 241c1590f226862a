import math

import pytest
import torch
from torch import Tensor

from kd_det.modeling.msad.fusion import CrossingFeatureFusion, MeanFusion, build_fusion

STRIDES = [8, 16]


def pyramids(images: int = 3, channels: int = 8) -> list[list[Tensor]]:
    return [
        [torch.randn(images, channels, 6, 10) + i, torch.randn(images, channels, 3, 5) - i]
        for i in range(2)
    ]


def slow_fusion(fusion: CrossingFeatureFusion, inputs: list[list[Tensor]]) -> list[Tensor]:
    """The formula, one image and one level at a time, in plain Python numbers."""
    squeeze, score = fusion.squeeze.weight.tolist(), fusion.score.weight.tolist()
    out = []
    for maps in zip(*inputs, strict=True):
        fused = torch.zeros_like(maps[0])
        for image in range(len(fused)):
            pooled = [float(c.mean()) for x in maps for c in x[image]]
            hidden = [
                max(sum(w * p for w, p in zip(row, pooled, strict=True)), 0) for row in squeeze
            ]
            logits = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in score]
            total = sum(math.exp(x) for x in logits)
            for x, logit in zip(maps, logits, strict=True):
                fused[image] += math.exp(logit) / total * x[image]
        out.append(fused)
    return out


def test_equals_the_formula_written_as_loops() -> None:
    fusion = CrossingFeatureFusion(channels=8, reduction=2)
    inputs = pyramids()
    torch.testing.assert_close(fusion(*inputs, STRIDES), slow_fusion(fusion, inputs))


def test_has_the_published_size() -> None:
    """512 x 32 + 32 x 2 weights, no biases, for all levels together."""
    fusion = CrossingFeatureFusion(channels=256)
    assert sum(p.numel() for p in fusion.parameters()) == 16448


def test_weights_are_convex_and_of_each_image() -> None:
    fusion = CrossingFeatureFusion(channels=8, reduction=1)
    maps = [x[0] for x in pyramids()]
    weights = fusion.weights(*maps, 8)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert (weights > 0).all()
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    alone = torch.cat([fusion.weights(*(x[i : i + 1] for x in maps), 8) for i in range(3)])
    torch.testing.assert_close(weights, alone)


def test_is_the_identity_on_equal_pyramids() -> None:
    pyramid, _ = pyramids()
    for fusion in (CrossingFeatureFusion(channels=8), MeanFusion()):
        torch.testing.assert_close(fusion(pyramid, pyramid, STRIDES), pyramid)


def test_masked_pooling_ignores_the_padding() -> None:
    """Image 0 is 17 x 33 pixels: 3 x 5 cells of stride 8, the last ones touched by one pixel."""
    fusion = CrossingFeatureFusion(channels=4, reduction=1)
    maps = [torch.randn(2, 4, 6, 10), torch.randn(2, 4, 6, 10)]
    sizes = [(17, 33), (48, 80)]
    weights = fusion.weights(*maps, 8, sizes)
    cropped = fusion.weights(*(x[:1, :, :3, :5] for x in maps), 8)
    torch.testing.assert_close(weights[:1], cropped)
    torch.testing.assert_close(weights[1:], fusion.weights(*(x[1:] for x in maps), 8))
    assert (weights[0] - fusion.weights(*maps, 8)[0]).abs().max() > 1e-3


def test_gradients() -> None:
    fusion = CrossingFeatureFusion(channels=2, reduction=1).double()
    a, b = (torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sizes = [(20, 32), (24, 9)]
    assert torch.autograd.gradcheck(lambda *x: fusion([x[0]], [x[1]], [8], sizes)[0], (a, b))


def test_autocast_keeps_weights_in_float32() -> None:
    fusion = CrossingFeatureFusion(channels=8)
    inputs = [[x.bfloat16() for x in pyramid] for pyramid in pyramids()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = fusion.weights(*(x[0] for x in inputs), 8)
        fused = fusion(*inputs, STRIDES)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, fusion.weights(*(x[0].float() for x in inputs), 8))
    assert [x.dtype for x in fused] == [torch.bfloat16] * 2


def test_mean() -> None:
    high, low = pyramids()
    fused = MeanFusion()(high, low, STRIDES)
    torch.testing.assert_close(fused[1], (high[1] + low[1]) / 2)


def test_errors_name_the_finding() -> None:
    high, low = pyramids()
    other = [low[0][..., :9], low[1]]
    for fusion in (build_fusion("cff", channels=8, reduction=16), MeanFusion()):
        with pytest.raises(ValueError, match=r"equal shapes, found .*6, 10.*6, 9"):
            fusion(high, other, STRIDES)
        with pytest.raises(ValueError, match="equal shapes"):
            fusion(high, low[:1], STRIDES)
    with pytest.raises(ValueError, match="'sum'; choose one of cff, mean"):
        build_fusion("sum", channels=8, reduction=16)
    with pytest.raises(ValueError, match="FUSION_REDUCTION is 0, expected at least 1"):
        build_fusion("cff", channels=8, reduction=0)
