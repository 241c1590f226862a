"""DDOD: numbers of another implementation, losses against loops, counts, guiding."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import spec_batch
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from spec_batch import (
    BOX_CLASSES,
    BOXES,
    THREE,
    TRUTH,
    anchors_of,
    class_logits,
    flat,
    instances,
    maps,
)
from tiny_dense import build_tiny, two_images
from torch import Tensor, nn

from kd_det.distillers.predictions import DensePredictions, decoder_of
from kd_det.functional.ddod import prediction_qualities
from kd_det.modeling.deform_conv import SelfDeformConv
from kd_det.modeling.dense.ddod import DDOD

Maps = list[Tensor]


def build(assigner: str = "atss", exponent: float = 0.5, *opts: Any) -> nn.Module:
    keys = ["MODEL.DDOD.ASSIGNER", assigner, "MODEL.DDOD.REG_IOU_EXPONENT", exponent]
    return spec_batch.build("ddod", *keys, *opts)


def deltas(n: Tensor, p: Tensor, j: Tensor) -> Tensor:
    centre = 2 * torch.sin(4 + n + 2 * p + 5 * j)
    return torch.where(j < 2, centre, -6 + 2 * torch.sin(1 + n + 3 * p + 4 * (j - 2)))


def teachers_deltas(n: Tensor, p: Tensor, j: Tensor) -> Tensor:
    centre = torch.sin(2 + n + 2 * p + 5 * j)
    return torch.where(j < 2, centre, -5 + 2 * torch.sin(1 + n + 3 * p + 4 * (j - 2)))


def predictions(images: Sequence[int] = (0, 1)) -> tuple[Maps, ...]:
    quality = maps(1, lambda n, p, j: torch.cos(n + 2 * p) + 0 * j, images)
    return class_logits(images), maps(4, deltas, images), quality


def teacher(model: nn.Module) -> DensePredictions:
    logits = maps(2, lambda n, p, k: 2 * torch.sin(2 + 3 * n + p + 7 * k) - 1)
    return decoder_of(model)([logits, maps(4, teachers_deltas)])


def assigned(model: nn.Module) -> list[list[list[int]]]:
    """Positions of each of the two boxes of image 0, for classes and for boxes."""
    logits, box_maps, _ = predictions()
    anchors = model.anchor_generator(logits)
    with torch.no_grad():
        matched = model.assign(flat(logits), flat(box_maps), [x.tensor for x in anchors], TRUTH)
    assert (matched[:, 1] == -1).all()
    return [[(part[0] == g).nonzero()[:, 0].tolist() for g in (0, 1)] for part in matched]


CASES: list[tuple[str, float, bool, list[Any], list[Any], list[float]]] = [
    ("atss", 0.5, False, [[5], [6, 14]], [[5, 6, 19], [14]], [3.293796, 1.599824, 0.939386]),
    (
        *("topk", 0.6, False),
        *([[5, 10], [6, 11, 14, 19]], [[5, 10], [6, 7, 14, 19]]),
        [1.901621, 1.683693, 0.883916],
    ),
    ("atss", 0.5, True, [[6], [7, 11]], [[5], [6, 7, 11]], [3.251966, 1.550506, 0.551570]),
    (
        *("topk", 0.6, True),
        *([[5, 6, 9], [7, 10, 11, 14, 15, 19]], [[5], [6, 7, 10, 11, 14, 19]]),
        [1.359388, 1.841637, 0.843705],
    ),
]


@pytest.mark.parametrize(("assigner", "exponent", "guided", "cls", "reg", "losses"), CASES)
def test_numbers_of_another_implementation(
    assigner: str, exponent: float, guided: bool, cls: list, reg: list, losses: list[float]
) -> None:
    model = build(assigner, exponent)
    guide = model.assigning_by(teacher(model)) if guided else contextlib.nullcontext()
    with guide:
        assert assigned(model) == [cls, reg]
        found = spec_batch.losses(model, predictions(), TRUTH)
    names = ["loss_ddod_cls", "loss_ddod_loc", "loss_ddod_quality"]
    assert [found[name].item() for name in names] == pytest.approx(losses, abs=1e-5)


def test_anchors_boxes_and_qualities_of_a_position() -> None:
    model = build()
    logits, box_maps, _ = predictions()
    anchors = torch.cat([x.tensor for x in model.anchor_generator(logits)])
    assert anchors[5].tolist() == [-24, -24, 40, 40]
    box = model.decode_boxes(flat(box_maps)[0, 5:6], anchors[5:6])
    expected = torch.tensor([[12.089982, -3.968028, 29.269567, 23.804885]])
    torch.testing.assert_close(box, expected, atol=1e-4, rtol=0)
    objects = TRUTH[0].gt_boxes.tensor, TRUTH[0].gt_classes
    (q,) = prediction_qualities(flat(logits)[0, 5:6], box, *objects, (0.8,))
    torch.testing.assert_close(q[0], torch.tensor([0.307552, 0.362057]), atol=1e-5, rtol=0)


def test_without_objects_every_position_is_background() -> None:
    found = spec_batch.losses(build(), predictions(), [instances([], [])] * 2)
    values = [loss.item() for loss in found.values()]
    assert values == pytest.approx([11.011744, 0, 0], abs=1e-5)


def test_an_object_that_no_prediction_meets_has_its_candidates() -> None:
    model = build()
    logits = flat(class_logits())[:1]
    anchors = anchors_of(model)
    boxes = torch.tensor([40.0, 40, 41, 41]).expand(20, 4)
    guide = DensePredictions(
        list(logits.split([16, 4], 1)),
        list(boxes[None].split([16, 4], 1)),
        strides=[8.0, 16.0],
        sizes=[(4, 4), (2, 2)],
        offset=0.0,
    )
    with model.assigning_by(guide):
        matched = model.assign(
            logits, torch.zeros(1, 20, 4), anchors, [instances(BOXES[:1], BOX_CLASSES[:1])]
        )
    assert [(x[0] == 0).nonzero()[:, 0].tolist() for x in matched] == [[5, 6, 9, 10, 19]] * 2


def losses_with_loops(model: DDOD, outputs: list[Tensor], truth: list[Instances]) -> list[float]:
    """The three losses, position by position in Python's numbers; fresh counts."""
    anchors = anchors_of(model)
    logits, box_outputs, quality = outputs
    matched = model.assign(logits, box_outputs, anchors, truth)
    objects = torch.cat([x.gt_boxes.tensor for x in truth])
    classes = torch.cat([x.gt_classes for x in truth])
    level = [i for i, part in enumerate(anchors) for _ in part]
    every = torch.cat(anchors)
    totals, divisors = [0.0, 0.0, 0.0], [0, 0]
    factors = []
    for a in range(2):
        counts = [0] * len(anchors)
        for n in range(len(truth)):
            positives = [p for p in range(20) if matched[a, n, p] >= 0]
            divisors[a] += max(len(positives), 1)
            for p in positives:
                counts[level[p]] += 1
        spread = max(counts) - min(counts)
        factors.append([2 - (c - min(counts)) / spread if spread else 2.0 for c in counts])
    for n in range(len(truth)):
        for p in range(20):
            for k in range(2):
                z = logits[n, p, k].item()
                s = 1 / (1 + math.exp(-z))
                own = matched[0, n, p] >= 0 and classes[matched[0, n, p]] == k
                part = -0.25 * (1 - s) ** 2 * math.log(s) if own else 0
                part += 0 if own else -0.75 * s**2 * math.log(1 - s)
                totals[0] += factors[0][level[p]] * part / divisors[0]
            if matched[1, n, p] < 0:
                continue
            target = objects[matched[1, n, p]].tolist()
            x1, y1, x2, y2 = every[p].tolist()
            dx, dy, dw, dh = box_outputs[n, p].tolist()
            cx, cy = (x1 + x2) / 2 + dx / 10 * (x2 - x1), (y1 + y2) / 2 + dy / 10 * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw / 5), (y2 - y1) * math.exp(dh / 5)
            box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            low = [max(a, b) for a, b in zip(box[:2], target[:2], strict=True)]
            high = [min(a, b) for a, b in zip(box[2:], target[2:], strict=True)]
            common = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
            union = w * h + (target[2] - target[0]) * (target[3] - target[1]) - common
            hull = max(box[2], target[2]) - min(box[0], target[0])
            hull *= max(box[3], target[3]) - min(box[1], target[1])
            weight = factors[1][level[p]] / divisors[1]
            totals[1] += 2 * weight * (1 - common / union + (hull - union) / hull)
            u, iou = quality[n, p, 0].item(), common / union
            s = 1 / (1 + math.exp(-u))
            totals[2] -= weight * (iou * math.log(s) + (1 - iou) * math.log(1 - s))
    return totals


@pytest.mark.parametrize("assigner", ["atss", "topk"])
@pytest.mark.parametrize("seed", range(2))
def test_losses_against_loops(assigner: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = build(assigner)

    def noise(channels: int) -> Tensor:
        return torch.randn(3, 20, channels, generator=generator)

    sizes = torch.tensor([1, 1, 5, 5])
    outputs = [noise(2), noise(4) * sizes / 2 - torch.tensor([0, 0, 4, 4]), noise(1)]
    expected = losses_with_loops(model, outputs, THREE)
    with EventStorage():
        found = model.losses_of_batch(outputs, anchors_of(model), THREE)
    assert [x.item() for x in found.values()] == pytest.approx(expected, rel=1e-4)


def test_levels_are_counted_in_training_alone_and_weigh_the_next_step() -> None:
    model = build()
    first = spec_batch.losses(model, predictions(), TRUTH)
    assert model.level_counts.tolist() == [[3, 0], [3, 1]]
    model.level_counts[:] = torch.tensor([[0, 9], [0, 9]])
    second = spec_batch.losses(model, predictions(), TRUTH)
    assert model.level_counts.tolist() == [[3, 9], [3, 10]]
    assert second["loss_ddod_cls"] != first["loss_ddod_cls"]
    assert "level_counts" not in model.state_dict()
    with torch.no_grad():  # as PreciseBN passes batches in training mode
        spec_batch.losses(model, predictions(), TRUTH)
    model.eval()
    model(two_images())
    assert model.level_counts.tolist() == [[3, 9], [3, 10]]


def test_levels_may_weigh_the_same() -> None:
    model = build("atss", 0.5, "MODEL.DDOD.LEVEL_REWEIGHT", False)
    found = spec_batch.losses(model, predictions(), [instances([], [])] * 2)
    assert found["loss_ddod_cls"].item() == pytest.approx(11.011744 / 2, abs=1e-5)
    assert not model.level_counts.any()


def test_iou_targets_are_the_detectors_own_and_detached() -> None:
    model = build()
    logits, box_maps, quality = predictions()
    leaves = [x.requires_grad_() for x in box_maps]
    with model.assigning_by(teacher(model)):
        losses = spec_batch.losses(model, (logits, leaves, quality), TRUTH)
    assert not losses["loss_ddod_quality"].requires_grad
    assert losses["loss_ddod_loc"].requires_grad


def test_guides_that_do_not_fit_are_refused() -> None:
    model = build()
    own = teacher(model)
    wrong = DensePredictions(
        [own.logits[0][..., :1]], own.boxes[:1], strides=[4.0], sizes=[(4, 4)], offset=0.5
    )
    with (
        pytest.raises(
            ValueError,
            match=r"DDOD cannot assign by these predictions: strides \[4.0\] instead of "
            r"\[8.0, 16.0\], offset of positions 0.5 instead of 0.0, classes 1 instead of 2",
        ),
        model.assigning_by(wrong),
    ):
        pass
    half = DensePredictions(
        [x[:1] for x in own.logits], [x[:1] for x in own.boxes], own.strides, own.sizes, own.offset
    )
    with (
        model.assigning_by(half),
        pytest.raises(
            ValueError, match=r"for \[\(1, 16\), \(1, 4\)\] .* sees \[\(2, 16\), \(2, 4\)\]"
        ),
    ):
        spec_batch.losses(model, predictions(), TRUTH)
    # Neither stays.
    assert assigned(model) == [[[5], [6, 14]], [[5, 6, 19], [14]]]


def test_registered_and_named() -> None:
    model = build_tiny("ddod", "MODEL.DDOD.NUM_CONVS", 2)
    assert isinstance(model, META_ARCH_REGISTRY.get("DDOD"))
    parts = {name.split(".")[1] for name, _ in model.named_parameters() if "head." in name}
    names = {"cls_subnet", "bbox_subnet", "cls_score", "bbox_pred", "quality", "scales"}
    assert parts == names
    for tower in (model.head.cls_subnet, model.head.bbox_subnet):
        assert [type(x).__name__ for x in tower] == [
            *["SelfDeformConv", "GroupNorm", "ReLU"],
            *["Conv2d", "GroupNorm", "ReLU"],
        ]
        assert not tower[0].offset.weight.any()
        assert 0.005 < tower[0].weight.std() < 0.015


def test_score_is_class_times_quality() -> None:
    scores = build_tiny("ddod").scores(torch.tensor([[0.4]]).sigmoid(), torch.tensor([[1.2]]))
    assert scores.item() == pytest.approx(0.460106, abs=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ASSIGNER", "best", r"ASSIGNER is 'best', expected one of atss, topk"),
        ("REG_IOU_EXPONENT", 1.5, r"REG_IOU_EXPONENT is 1\.5, expected a number from 0 to 1"),
    ],
)
def test_values_out_of_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.DDOD\.{message}"):
        build_tiny("ddod", f"MODEL.DDOD.{key}", value)


def test_its_anchors_are_as_in_the_paper() -> None:
    model = build_tiny("ddod")
    anchors = model.anchor_generator([torch.zeros(1, 1, 2, 2)] * 3)
    assert isinstance(anchors[0], Boxes)
    assert anchors[0].tensor[3].tolist() == [-24.0, -24.0, 40.0, 40.0]
    assert isinstance(model.head.cls_subnet[0], SelfDeformConv)
