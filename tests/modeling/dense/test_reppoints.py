"""RepPoints: numbers of another implementation, gradients of its points."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import spec_batch
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from spec_batch import (
    THREE,
    TRUTH,
    anchors_of,
    class_logits,
    flat,
    maps,
)
from tiny_dense import build_tiny, two_images
from torch import Tensor, nn

from kd_det.distillers.predictions import decoder_of
from kd_det.modeling.dense.reppoints import RepPoints, RepPointsOptions
from kd_det.modeling.dense.reppoints_head import RepPointsHead

NAMES = ["loss_reppoints_cls", "loss_reppoints_init", "loss_reppoints_refine"]
# The taps of a 3x3 kernel, (y, x).
TAPS = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)).flatten().double()
Maps = list[Tensor]


def build(*opts: Any) -> nn.Module:
    model = spec_batch.build("reppoints", *opts)
    if model.head.spread is not None:
        model.head.spread.data = torch.tensor([0.1, -0.2])
    return model


def first_points(n: Tensor, p: Tensor, c: Tensor) -> Tensor:
    k, a = c.div(2, rounding_mode="floor"), c % 2
    return TAPS + 0.4 * torch.sin(n + p + 2 * k + 5 * a)


def refined_points(n: Tensor, p: Tensor, c: Tensor) -> Tensor:
    k, a = c.div(2, rounding_mode="floor"), c % 2
    return first_points(n, p, c) + 0.3 * torch.cos(n + 2 * p + k + 3 * a)


def predictions(images: Sequence[int] = (0, 1)) -> tuple[Maps, ...]:
    points = maps(18, refined_points, images), maps(18, first_points, images)
    return class_logits(images), *points


@pytest.mark.parametrize(
    ("thresholds", "ignored", "second", "losses"),
    [
        ([0.4, 0.5], [5], [[6], [19]], [3.325618, 0.099698, 0.106199]),
        ([0.25, 0.3], [], [[5, 6], [10, 11, 14, 19]], [1.567693, 0.099698, 0.266828]),
    ],
)
def test_numbers_of_another_implementation(
    thresholds: list[float], ignored: list[int], second: list[list[int]], losses: list[float]
) -> None:
    model = build("MODEL.REPPOINTS.IOU_THRESHOLDS", thresholds)
    initial = flat(predictions()[2])
    matched = model.assign(initial, torch.cat(anchors_of(model)), TRUTH)
    found = [[(x[0] == g).nonzero()[:, 0].tolist() for g in (0, 1)] for x in matched]
    assert found == [[[6], [10]], second]
    assert (matched[1, 0] == -2).nonzero()[:, 0].tolist() == ignored
    assert (matched[:, 1] == -1).all()
    values = spec_batch.losses(model, predictions(), TRUTH)
    assert [values[name].item() for name in NAMES] == pytest.approx(losses, abs=1e-5)


def test_boxes_of_a_position() -> None:
    model = build()
    outputs = predictions()
    anchors = torch.cat(anchors_of(model))[5:6]
    assert anchors.tolist() == [[4, 4, 12, 12]]
    with torch.no_grad():
        refined, first = (model.decode_boxes(flat(x)[0, 5:6], anchors) for x in outputs[1:])
        decoded = decoder_of(model)(outputs).boxes[0][0, 5]
    expected = torch.tensor([[-1.772857, 2.081778, 17.511308, 14.064555]])
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)
    expected = torch.tensor([[-1.203696, 1.859833, 17.241372, 14.137806]])
    torch.testing.assert_close(refined, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, expected[0], atol=1e-4, rtol=0)


def losses_with_loops(model: RepPoints, outputs: list[Tensor], truth: list[Instances]) -> list:
    """The three losses, position by position in Python's numbers."""
    logits, refined, initial = outputs
    anchors = torch.cat(anchors_of(model))
    matched = model.assign(initial, anchors, truth)
    objects = torch.cat([x.gt_boxes.tensor for x in truth]).tolist()
    classes = torch.cat([x.gt_classes for x in truth]).tolist()
    spread = model.head.spread.tolist()
    divisors = [sum(max(int((x >= 0).sum()), 1) for x in part) for part in matched]
    totals = [0.0, 0.0, 0.0]
    for n in range(len(truth)):
        for p in range(20):
            if matched[1, n, p] != -2:
                for k in range(2):
                    s = 1 / (1 + math.exp(-logits[n, p, k].item()))
                    own = matched[1, n, p] >= 0 and classes[matched[1, n, p]] == k
                    part = 0.25 * (1 - s) ** 2 * math.log(s) if own else 0
                    part += 0 if own else 0.75 * s**2 * math.log(1 - s)
                    totals[0] -= part / divisors[1]
            x1, y1, x2, _ = anchors[p].tolist()
            stride = x2 - x1
            for stage, (points, factor) in enumerate(((initial, 0.5), (refined, 1.0))):
                if matched[stage, n, p] < 0:
                    continue
                ys, xs = points[n, p, 0::2].tolist(), points[n, p, 1::2].tolist()
                box = []
                for values, origin, lam in ((xs, x1, spread[0]), (ys, y1, spread[1])):
                    mean = sum(values) / 9
                    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 8)
                    half = deviation * math.exp(lam)
                    middle = origin + stride / 2
                    box.append([middle + stride * (mean - half), middle + stride * (mean + half)])
                corners = [box[0][0], box[1][0], box[0][1], box[1][1]]
                for own, target in zip(corners, objects[matched[stage, n, p]], strict=True):
                    d = abs(own - target) / (4 * stride)
                    value = d * d / 0.22 if d < 0.11 else d - 0.055
                    totals[1 + stage] += factor * value / divisors[stage]
    return totals


@pytest.mark.parametrize("seed", range(3))
def test_losses_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = build()
    logits = torch.randn(3, 20, 2, generator=generator)
    initial = TAPS.float() + torch.randn(3, 20, 18, generator=generator)
    refined = initial + 0.5 * torch.randn(3, 20, 18, generator=generator)
    outputs = [logits, refined, initial]
    with torch.no_grad():
        expected = losses_with_loops(model, outputs, THREE)
    with EventStorage():
        found = model.losses_of_batch(outputs, anchors_of(model), THREE)
    assert [x.item() for x in found.values()] == pytest.approx(expected, rel=1e-4)


def head(gradient_mul: float = 0.1) -> RepPointsHead:
    torch.manual_seed(0)
    levels = build_tiny("reppoints").backbone.output_shape()
    out = RepPointsHead(
        input_shape=[levels["p3"]],
        num_classes=3,
        num_convs=1,
        norm="GN",
        gradient_mul=gradient_mul,
    )
    for parameter in out.parameters():  # a fresh one hardly depends on its points
        if parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.2)
    return out


def test_maps_are_read_at_the_first_points() -> None:
    """Feature 10 * row + column; the points are those of the deformable convolution's test."""
    model = head()
    with torch.no_grad():
        for conv in (model.initial_pred, model.cls_deform, model.cls_score):
            conv.weight.zero_()
        model.cls_subnet = nn.Sequential(nn.Identity())
        # All points at the position itself but the sixth: half a cell down, a quarter left.
        model.initial_pred.bias[10:12] = torch.tensor([0.5, -0.25])
        model.cls_deform.weight[0, 0, 1, 2] = 1
        model.cls_score.weight[0, 0] = 1
        model.cls_score.bias.zero_()
        place = torch.arange(5.0)[:, None] * 10 + torch.arange(5.0)
        logits, _, initial = model([place.expand(1, 16, 5, 5)])
    out = logits[0][0, 0]
    values = torch.stack([out[2, 2], out[0, 0], out[4, 2]])
    torch.testing.assert_close(values, torch.tensor([26.75, 3.75, 20.875]))
    assert initial[0][0, 10:12, 2, 2].tolist() == [0.5, -0.25]


def test_a_tenth_of_the_gradient_reaches_the_first_points() -> None:
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    gradients = []
    for factor in (1.0, 0.1):
        model = head(factor)
        logits, refined, _ = model([x])
        (logits[0].sum() + refined[0].square().sum()).backward()
        gradients.append(model.initial_pred.weight.grad)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0], rtol=1e-4, atol=1e-5)


def test_refining_moves_the_first_points_not_by_addition() -> None:
    model = head(0.0)
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    _, refined, initial = model([x])
    refined[0].sum().backward(retain_graph=True)
    assert not model.initial_pred.weight.grad.any()
    initial[0].sum().backward()
    assert model.initial_pred.weight.grad.any()


def test_registered_and_named() -> None:
    model = build_tiny("reppoints")
    assert isinstance(model, META_ARCH_REGISTRY.get("RepPoints"))
    parts = {name.split(".")[1] for name, _ in model.named_parameters() if "head." in name}
    assert parts == {
        *("cls_subnet", "bbox_subnet", "cls_score", "bbox_pred", "spread"),
        *("initial_conv", "initial_pred", "cls_deform", "refine_deform"),
    }
    assert [type(x).__name__ for x in model.head.cls_subnet] == ["Conv2d", "GroupNorm", "ReLU"]
    assert model.head.cls_score.bias.tolist() == pytest.approx([-math.log(99)] * 3)
    weights = [p for name, p in model.head.named_parameters() if p.dim() == 4]
    assert all(0.004 < weight.std() < 0.016 for weight in weights)
    assert RepPointsOptions().num_convs == 3 and RepPointsOptions().nms_thresh_test == 0.5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_POINTS", 4, r"NUM_POINTS is 4, expected 9, 25 or 49"),
        ("TRANSFORM", "mean", r"TRANSFORM is 'mean', expected one of moment, minmax"),
        ("IOU_THRESHOLDS", [0.5, 0.4], r"IOU_THRESHOLDS is \[0\.5, 0\.4\], expected two numbers"),
    ],
)
def test_values_out_of_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.REPPOINTS\.{message}"):
        build_tiny("reppoints", f"MODEL.REPPOINTS.{key}", value)


def test_points_are_float32_under_autocast() -> None:
    model = build_tiny("reppoints")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.preprocess_image(two_images())
        features = model.backbone(images.tensor)
        _, refined, initial = model.head([features[name] for name in model.head_in_features])
    assert all(x.dtype == torch.float32 for x in (*refined, *initial))
