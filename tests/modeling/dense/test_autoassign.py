"""AutoAssign: the released code's numbers, loops over boxes."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import spec_batch
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from spec_batch import BOX_CLASSES, BOXES
from tiny_dense import build_tiny, losses_of, make_image
from torch import Tensor, nn

TINY = [9.0, 9, 11, 11]  # holds no position
SECOND_PRIOR = [[0.0, 0], [0.3, -0.2]], [[1.0, 1], [1.5, 0.7]]


def spec_outputs(images: Sequence[int] = (0, 1)) -> tuple[list[Tensor], ...]:
    boxes = spec_batch.maps(4, lambda n, p, j: 1.2 + torch.sin(2 + n + 2 * p + 5 * j), images)
    objectness = spec_batch.maps(1, lambda n, p, _: torch.cos(n + p), images)
    return spec_batch.class_logits(images), boxes, objectness


def spec_losses(
    boxes: Sequence[Sequence[float]] = BOXES,
    classes: Sequence[int] = BOX_CLASSES,
    prior: Any = None,
    images: Sequence[int] = (0, 1),
) -> tuple[nn.Module, dict[str, Tensor]]:
    model = spec_batch.build("autoassign")
    if prior is not None:
        model.head.center_mean.data = torch.tensor(prior[0])
        model.head.center_sigma.data = torch.tensor(prior[1])
    truth = [
        spec_batch.instances(boxes if n == 0 else [], classes if n == 0 else []) for n in images
    ]
    return model, spec_batch.losses(model, spec_outputs(images), truth)


def values(losses: dict[str, Tensor]) -> list[float]:
    return [losses[f"loss_autoassign_{part}"].item() for part in ("pos", "neg", "center")]


def test_decoding_by_hand() -> None:
    # Position (24, 8), stride 8; a negative distance is none.
    cell = torch.tensor([[20.0, 4, 28, 12]])
    outputs = torch.tensor([[1.5, 0.5, 2, -1]])
    boxes = build_tiny("autoassign").decode_boxes(outputs, cell)
    torch.testing.assert_close(boxes, torch.tensor([[12.0, 4, 40, 8]]))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, [1.396055, 0.200077, 0.085555]),
        ({"prior": SECOND_PRIOR}, [1.378915, 0.215832, 0.092292]),
        # Both of one class, in reverse order: the largest share counts where they overlap.
        ({"boxes": BOXES[::-1], "classes": [1, 1]}, [1.410521, 0.213166, None]),
        ({"boxes": [*BOXES, TINY], "classes": [*BOX_CLASSES, 1]}, [0.930703, 0.200077, 0.128332]),
        ({"images": [1]}, [0, 0.473778, 0]),
    ],
    ids=["fresh prior", "other prior", "one class", "box without position", "no boxes"],
)
def test_losses_of_the_release(case: dict[str, Any], expected: list[float | None]) -> None:
    _, losses = spec_losses(**case)
    for found, value in zip(values(losses), expected, strict=True):
        assert value is None or found == pytest.approx(value, abs=1e-5)


def test_decoded_box_of_the_spec_batch() -> None:
    model = spec_batch.build("autoassign")
    cell = torch.tensor([[4.0, 4, 12, 12]])  # p = 5
    outputs = spec_outputs()[1][0][0].flatten(1).T[5:6]
    expected = torch.tensor([[2.692583, 6.091180, 17.529190, 25.251007]])
    torch.testing.assert_close(model.decode_boxes(outputs, cell), expected)


def test_gradients_of_the_prior() -> None:
    def gradients(part: str) -> list[Tensor]:
        model, losses = spec_losses(prior=SECOND_PRIOR)
        losses[f"loss_autoassign_{part}"].backward()
        return [model.head.center_mean.grad, model.head.center_sigma.grad]

    for part, mean, sigma in (("pos", -0.003985, 0.002651), ("center", 0.005545, -0.003526)):
        of_mean, of_sigma = gradients(part)
        assert of_mean[1, 0].item() == pytest.approx(mean, abs=1e-6)
        assert of_sigma[1, 0].item() == pytest.approx(sigma, abs=1e-6)
    # Neither through the weights of negatives nor through what the loss is divided by.
    _, losses = spec_losses(prior=SECOND_PRIOR)
    assert not losses["loss_autoassign_neg"].requires_grad


def loop_losses(
    model: nn.Module, predictions: tuple[list[Tensor], ...], truth: list[Instances]
) -> list[float]:
    """Sections 2.2 to 2.4 of the description, box by box and position by position in float64."""
    flat = [torch.cat([x.flatten(2) for x in y], dim=2).double() for y in predictions]
    grid = [(8, r, c) for r in range(4) for c in range(4)]
    grid += [(16, r, c) for r in range(2) for c in range(2)]
    mean, sigma = (x.detach().double() for x in (model.head.center_mean, model.head.center_sigma))
    pos = neg = total_prior = center = 0.0
    for n, found in enumerate(truth):
        boxes, classes = found.gt_boxes.tensor.double().tolist(), found.gt_classes.tolist()
        predicted = []
        for j, (s, r, c) in enumerate(grid):
            left, top, right, bottom = (max(x, 0) * s for x in flat[1][n, :, j].tolist())
            predicted.append([c * s - left, r * s - top, c * s + right, r * s + bottom])
        p = (flat[0][n].sigmoid() * flat[2][n].sigmoid()).T.tolist()  # (20, K)
        weight = [[1.0] * len(p[0]) for _ in p]
        image_prior = 0.0
        for box, label in zip(boxes, classes, strict=True):
            middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            inside = [
                j
                for j, (s, r, c) in enumerate(grid)
                if box[0] < c * s < box[2] and box[1] < r * s < box[3]
            ]
            prior, confidence, best = [], [], []
            for j in inside:
                s, r, c = grid[j]
                away = [(c * s - middle[0]) / s, (r * s - middle[1]) / s]
                exponent = sum(
                    (away[a] - mean[label, a].item()) ** 2 / (2 * sigma[label, a].item() ** 2)
                    for a in range(2)
                )
                prior.append(math.exp(-exponent))
                giou = loop_overlap(predicted[j], box)[1]
                confidence.append(p[j][label] * math.exp(-5 * (1 - giou)))
                best.append(
                    1 / max(1 - max(loop_overlap(predicted[j], b)[0] for b in boxes), 1e-12)
                )
            image_prior += sum(prior)
            if not inside:
                continue
            weights = [math.exp(3 * x) * g for x, g in zip(confidence, prior, strict=True)]
            found_mean = sum(w * x for w, x in zip(weights, confidence, strict=True)) / sum(weights)
            pos += -math.log(found_mean)
            for j, v in zip(inside, best, strict=True):
                share = (v - min(best) + 1e-12) / (max(best) - min(best) + 1e-12)
                weight[j][label] = min(weight[j][label], 1 - share)
        for row, factors in zip(p, weight, strict=True):
            q = [x * w for x, w in zip(row, factors, strict=True)]
            neg += sum(-(x**2) * math.log(1 - x) for x in q)
        total_prior += image_prior
        center += len(boxes) / image_prior if image_prior else 0.0
    boxes_in_all = sum(len(x) for x in truth)
    return [
        0.25 * pos / max(boxes_in_all, 1),
        0.75 * neg / max(total_prior, 1),
        0.75 * center / len(truth),
    ]


def loop_overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    def area(box: list[float]) -> float:
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - common
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    iou = common / max(union, 1e-6)
    return iou, iou - (hull - union) / max(hull, 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_losses_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    model = spec_batch.build("autoassign")
    model.head.center_mean.data = rand(2, 2) - 0.5
    model.head.center_sigma.data = 0.5 + rand(2, 2)
    sizes, channels = [(4, 4), (2, 2)], (2, 4, 1)
    predictions = tuple([3 * rand(3, c, *size) - 1 for size in sizes] for c in channels)
    truth = []
    for count in (5, 0, 2):
        low = rand(count, 2) * 20
        boxes = torch.cat([low, low + 1 + rand(count, 2) * 16], dim=1)
        truth.append(spec_batch.instances(boxes.tolist(), (rand(count) * 2).long().tolist()))
    expected = loop_losses(model, predictions, truth)
    assert min(expected) > 0
    assert values(spec_batch.losses(model, predictions, truth)) == pytest.approx(expected, rel=1e-4)


def test_registered_head_and_its_start() -> None:
    model = build_tiny("autoassign")
    assert isinstance(model, META_ARCH_REGISTRY.get("AutoAssign"))
    parts = {name.split(".")[1] for name, _ in model.named_parameters() if "head." in name}
    convs = {"cls_subnet", "bbox_subnet", "cls_score", "bbox_pred", "quality"}
    assert parts == {*convs, "scales", "center_mean", "center_sigma"}
    assert torch.equal(model.head.cls_score.bias, torch.full((3,), -math.log(49)))
    assert torch.equal(model.head.bbox_pred.bias, torch.full((4,), 4.0))
    assert not model.head.center_mean.any() and (model.head.center_sigma == 1).all()


def test_a_prior_without_width_stays_finite() -> None:
    prior = [[[0.0, 0], [0.0, 0]], [[0.0, 0], [0.0, 0]]]
    # The second box has a position exactly at its mean, the first has none anywhere near.
    model, losses = spec_losses(boxes=[BOXES[0], [0.0, 0, 32, 32]], prior=prior)
    sum(losses.values()).backward()
    assert all(math.isfinite(x) for x in values(losses))
    assert model.head.center_mean.grad.isfinite().all()
    assert model.head.center_sigma.grad.isfinite().all()


def test_certain_predictions_stay_finite() -> None:
    model = spec_batch.build("autoassign")
    classes, boxes, objectness = spec_outputs()
    certain = [[x * 1e4 for x in classes], boxes, [x * 0 + 1e4 for x in objectness]]
    leaves = [x.requires_grad_() for levels in certain for x in levels]
    truth = [spec_batch.instances(BOXES, BOX_CLASSES), spec_batch.instances([], [])]
    losses = spec_batch.losses(model, tuple(certain), truth)
    sum(losses.values()).backward()
    assert all(math.isfinite(x) for x in values(losses))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_images_of_other_sizes_in_one_batch() -> None:
    model = build_tiny("autoassign")
    wide, small = make_image([[50, 20, 90, 60]], [2]), make_image([[4, 4, 40, 36]], [0])
    fields = small["instances"].get_fields()
    small = {"image": small["image"][:, :40, :56], "instances": Instances((40, 56), **fields)}
    both, *alone = (losses_of(model, batch) for batch in ([wide, small], [wide], [small]))
    # The prior reads positions and boxes, not the padding, and is averaged over images.
    expected = sum(losses["loss_autoassign_center"] for losses in alone) / 2
    torch.testing.assert_close(both["loss_autoassign_center"], expected)


def test_score_is_class_times_objectness() -> None:
    model = build_tiny("autoassign")
    scores = model.scores(torch.tensor([[1.0]]).sigmoid(), torch.tensor([[-0.5]]))
    assert scores.item() == pytest.approx(0.276004, abs=1e-6)


def test_temperature_above_0() -> None:
    with pytest.raises(ValueError, match=r"AUTOASSIGN\.TEMPERATURE is 0\.0, expected above 0"):
        build_tiny("autoassign", "MODEL.AUTOASSIGN.TEMPERATURE", 0.0)
