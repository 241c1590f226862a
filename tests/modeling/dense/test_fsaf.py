"""FSAF: MMDetection's numbers, loops over boxes."""

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

from kd_det.functional.fsaf import select_levels
from kd_det.modeling.dense import fsaf

PAPER_MARGIN = ("MODEL.FSAF.IGNORE", 0.5)
GRID = [(8, r, c) for r in range(4) for c in range(4)]
GRID += [(16, r, c) for r in range(2) for c in range(2)]


def spec_outputs(images: Sequence[int] = (0, 1)) -> tuple[list[Tensor], ...]:
    def sides(n: Tensor, p: Tensor, j: Tensor) -> Tensor:
        return 0.2 + 0.1 * torch.sin(2 + n + 2 * p + 5 * j)

    return spec_batch.class_logits(images), spec_batch.maps(4, sides, images)


def values(losses: dict[str, Tensor]) -> list[float]:
    return [losses[f"loss_fsaf_{part}"].item() for part in ("cls", "loc")]


def test_decoding_by_hand() -> None:
    # Position (48, 32), stride 16, unit 64: top 32, bottom 16, left 0, right 48 pixels.
    cell = torch.tensor([[40.0, 24, 56, 40]])
    outputs = torch.tensor([[0.5, 0.25, -0.3, 0.75]])
    model = build_tiny("fsaf")
    torch.testing.assert_close(model.decode_boxes(outputs, cell), torch.tensor([[48.0, 0, 96, 48]]))
    # Position 5 of image 0 of the spec batch, unit 32.
    fifth = spec_outputs()[1][0][0].flatten(1).T[5:6]
    found = model.decode_boxes(fifth, torch.tensor([[4.0, 4, 12, 12]]))
    assert found[0].tolist() == pytest.approx([1.628324, 3.317033, 17.460403, 11.323528], abs=1e-5)


@pytest.mark.parametrize(
    ("opts", "images", "expected"),
    [
        ((), (0, 1), [2.146213, 1.282888]),
        (PAPER_MARGIN, (0, 1), [2.144317, 1.282888]),
        ((), (1,), [0.250241, 0]),
    ],
    ids=["defaults", "paper's margin", "no boxes"],
)
def test_losses_of_mmdetection(
    opts: tuple[Any, ...], images: tuple[int, ...], expected: list[float]
) -> None:
    objects = (BOXES, BOX_CLASSES), ([], [])
    truth = [spec_batch.instances(*objects[n]) for n in images]
    losses = spec_batch.losses(spec_batch.build("fsaf", *opts), spec_outputs(images), truth)
    assert values(losses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("opts", "second"), [((), 1.732073), (PAPER_MARGIN, 1.731989)])
def test_mean_losses_of_the_levels(
    opts: tuple[Any, ...], second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def listen(*args: Any) -> Tensor:
        asked.extend(args[:4])
        return select_levels(*args)

    monkeypatch.setattr(fsaf, "select_levels", listen)
    truth = [spec_batch.instances(BOXES, BOX_CLASSES), spec_batch.instances([], [])]
    spec_batch.losses(spec_batch.build("fsaf", *opts), spec_outputs(), truth)
    loss, positive, box, level = asked

    def mean(g: int, number: int) -> float:
        return loss[positive & (box == g) & (level == number)].mean().item()

    found = [mean(0, 0), mean(0, 1), mean(1, 0)]
    assert found == pytest.approx([1.299726, 0.994886, second], abs=1e-5)
    assert math.isnan(mean(1, 1))  # box 1 has no positive there


def cover(cell: tuple[int, int, int], box: list[float], shrink: float) -> float:
    s, r, c = cell
    sides = []
    for low, high, x in ((box[0], box[2], c * s), (box[1], box[3], r * s)):
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        sides.append(max(min(x + s / 2, middle + half) - max(x - s / 2, middle - half), 0))
    return sides[0] * sides[1] / s**2


def loop_labels(
    boxes: list[list[float]], classes: list[int], core: float, ignore: float, dominates: bool
) -> tuple[dict[int, int], set[tuple[int, int]]]:
    """Section 5.3 of the description: box of each positive, and the ignored (position, class)."""
    owner: dict[int, int] = {}
    ignored: set[tuple[int, int]] = set()
    for j, cell in enumerate(GRID):
        s, r, c = cell
        cores = []
        for g, box in enumerate(boxes):
            inside = box[0] < c * s < box[2] and box[1] < r * s < box[3]
            if inside and cover(cell, box, core) > 0.01:
                cores.append(g)
            elif cover(cell, box, ignore) > 0.01:
                ignored.add((j, classes[g]))
        cores.sort(key=lambda g: (boxes[g][2] - boxes[g][0]) * (boxes[g][3] - boxes[g][1]))
        ignored |= {(j, classes[g]) for g in cores[1:]}
        if cores and dominates:
            owner[j] = cores[0]
            ignored.discard((j, classes[cores[0]]))
        elif cores and (j, classes[cores[0]]) not in ignored:
            owner[j] = cores[0]
    return owner, ignored


def focal(p: float, positive: bool) -> float:
    if positive:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def loop_losses(
    predictions: tuple[list[Tensor], ...], truth: list[Instances], dominates: bool
) -> list[float]:
    """Sections 5.2 to 5.5, box by box and position by position in float64."""
    logits, sides = (torch.cat([x.flatten(2) for x in y], dim=2).double() for y in predictions)
    cls = loc = positives = 0.0
    for n, found in enumerate(truth):
        boxes, classes = found.gt_boxes.tensor.double().tolist(), found.gt_classes.tolist()
        owner, ignored = loop_labels(boxes, classes, 0.3, 0.5, dominates)
        p = logits[n].sigmoid().T.tolist()

        def class_losses(
            j: int, p: Any = p, owner: Any = owner, classes: Any = classes, ignored: Any = ignored
        ) -> list[float]:
            own = classes[owner[j]] if j in owner else None
            return [
                0.0 if (j, k) in ignored else focal(p[j][k], k == own) for k in range(len(p[j]))
            ]

        box_loss = {}
        for j, g in owner.items():
            s, r, c = GRID[j]
            t, b, le, ri = (4 * s * max(x, 1e-4) for x in sides[n, :, j].tolist())
            mine = [c * s - le, r * s - t, c * s + ri, r * s + b]
            width = min(mine[2], boxes[g][2]) - max(mine[0], boxes[g][0])
            height = min(mine[3], boxes[g][3]) - max(mine[1], boxes[g][1])
            common = max(width, 0) * max(height, 0)
            union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (mine, boxes[g])) - common
            box_loss[j] = -math.log(max(common / union, 1e-6))
        dropped = set()
        for g in range(len(boxes)):
            means = {}
            for s in (8, 16):
                there = [j for j in owner if owner[j] == g and GRID[j][0] == s]
                each = [sum(class_losses(j)) + box_loss[j] for j in there]
                means[s] = sum(each) / len(each) if each else math.inf
            best = min(means, key=lambda s: (means[s], s))
            dropped |= {j for j in owner if owner[j] == g and GRID[j][0] != best}
        for j in range(len(GRID)):
            each = class_losses(j)
            if j in dropped:
                each[classes[owner[j]]] = 0.0
            cls += sum(each)
        kept = set(owner) - dropped
        positives += len(kept)
        loc += sum(box_loss[j] for j in kept)
    assert positives
    return [cls / positives, loc / positives]


@pytest.mark.parametrize("dominates", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_losses_against_loops(seed: int, dominates: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    opts = ["MODEL.FSAF.CORE", 0.3, *PAPER_MARGIN, "MODEL.FSAF.FOREGROUND_DOMINATES", dominates]
    model = spec_batch.build("fsaf", *opts)
    sizes = [(4, 4), (2, 2)]
    predictions = (
        [4 * rand(3, 2, *size) - 3 for size in sizes],
        [0.6 * rand(3, 4, *size) - 0.1 for size in sizes],
    )
    truth = []
    for count in (6, 0, 3):
        low = rand(count, 2) * 16
        boxes = torch.cat([low, low + 4 + rand(count, 2) * 20], dim=1)
        truth.append(spec_batch.instances(boxes.tolist(), (rand(count) * 2).long().tolist()))
    expected = loop_losses(predictions, truth, dominates)
    assert values(spec_batch.losses(model, predictions, truth)) == pytest.approx(expected, rel=1e-4)


def test_registered_head_and_its_start() -> None:
    model = build_tiny("fsaf")
    assert isinstance(model, META_ARCH_REGISTRY.get("FSAF"))
    parts = {name.split(".")[1] for name, _ in model.named_parameters() if "head." in name}
    assert parts == {"cls_subnet", "bbox_subnet", "cls_score", "bbox_pred"}
    assert torch.equal(model.head.cls_score.bias, torch.full((3,), -math.log(99)))
    assert torch.equal(model.head.bbox_pred.bias, torch.full((4,), 0.25))
    assert not any(isinstance(module, nn.GroupNorm) for module in model.head.modules())


def test_no_gradient_through_the_choice_of_level_and_what_was_not_chosen() -> None:
    outputs = spec_outputs()
    leaves = [x.requires_grad_() for x in outputs[1]]
    truth = [spec_batch.instances(BOXES, BOX_CLASSES), spec_batch.instances([], [])]
    losses = spec_batch.losses(spec_batch.build("fsaf"), outputs, truth)
    losses["loss_fsaf_loc"].backward()
    trained = torch.cat([leaf.grad.flatten(2) for leaf in leaves], dim=2).abs().sum(dim=1) > 0
    # Box 0 has 5 and 6 on the first level and 19 on the second, which it chose; box 1 stays.
    assert trained[0].nonzero()[:, 0].tolist() == [10, 11, 14, 15, 19]
    assert not trained[1].any()


def test_images_of_other_sizes_in_one_batch() -> None:
    model = build_tiny("fsaf")
    # One prediction everywhere: losses depend on the labels alone.
    for tower in (model.head.cls_score, model.head.bbox_pred):
        nn.init.zeros_(tower.weight)
    wide, small = make_image([[50, 20, 90, 60]], [2]), make_image([[4, 4, 40, 36]], [0])
    fields = small["instances"].get_fields()
    cut = {"image": small["image"][:, :40, :56], "instances": Instances((40, 56), **fields)}
    mixed, same = (losses_of(model, [wide, x]) for x in (cut, small))
    # The padding's cells are negatives, as those of an image that is as large.
    torch.testing.assert_close(mixed["loss_fsaf_cls"], same["loss_fsaf_cls"])
    torch.testing.assert_close(mixed["loss_fsaf_loc"], same["loss_fsaf_loc"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CORE", 0.3, r"CORE and IGNORE are 0\.3 and 0\.2, .* 0 < CORE <= IGNORE <= 1"),
        ("MIN_COVER", 1.0, r"MIN_COVER is 1\.0, expected in \[0, 1\)"),
        ("BOX_SCALE", 0.0, r"BOX_SCALE is 0\.0, expected above 0"),
    ],
)
def test_options_out_of_range(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tiny("fsaf", f"MODEL.FSAF.{key}", value)
