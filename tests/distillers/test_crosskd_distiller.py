"""CrossKD with a small teacher's head; `functional.crosskd` has tests of its own."""

import contextlib
import copy
import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from contract import CHANNELS, SIDES, STRIDES, DistillerContract, K, Scene, scene_for
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn
from torchvision.ops import box_iou

import kd_det.modeling.dense.decoding  # noqa: F401
from kd_det.distillers import CrossKD, LevelShape, Step, TeacherModule
from kd_det.distillers.predictions import DensePredictions, decode_dense, register_decoder
from kd_det.functional.crosskd import align_statistics


class Head(nn.Module):
    """Two towers of two convolutions, as Detectron2's dense heads have them."""

    def __init__(self) -> None:
        super().__init__()

        def tower() -> nn.Sequential:
            convs = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2)]
            norm = CycleBatchNormList(2, num_features=CHANNELS)
            return nn.Sequential(convs[0], nn.ReLU(), convs[1], norm, nn.ReLU())

        self.cls_subnet, self.bbox_subnet = tower(), tower()
        self.cls_score = nn.Conv2d(CHANNELS, K, 3, padding=1)
        self.bbox_pred = nn.Conv2d(CHANNELS, 4, 3, padding=1)


class Detector(nn.Module):
    """A dense teacher without a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()
        self.anchor_generator = nn.Module()
        self.anchor_generator.strides = list(STRIDES)


@register_decoder(Detector)
def decode(model: Detector, outputs: Any) -> DensePredictions:
    """Boxes 16 pixels around the centre of a cell, and what the head adds."""
    boxes, logits = [], []
    for stride, scores, sides in zip(STRIDES, *outputs, strict=True):
        y, x = (torch.arange(n) * stride + stride / 2 for n in scores.shape[-2:])
        centres = torch.cartesian_prod(y, x).flip(1)
        distances = 16 + 4 * sides.flatten(2).transpose(1, 2)
        boxes.append(torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2))
        logits.append(scores.flatten(2).transpose(1, 2))
    sizes = [(x.shape[-2], x.shape[-1]) for x in outputs[0]]
    return DensePredictions(logits, boxes, list(STRIDES), sizes, 0.5)


def make_teacher() -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Detector()
        for x in model.modules():
            if isinstance(x, nn.BatchNorm2d):  # each level its own
                x.running_mean.normal_()
    return model.eval().requires_grad_(False)


TEACHER = make_teacher()


class DetectorWithQuality(Detector):
    """Says how good its boxes are, and has square anchors of 4 strides."""

    def __init__(self) -> None:
        super().__init__()
        self.head.quality = nn.Conv2d(CHANNELS, 1, 3, padding=1)


@register_decoder(DetectorWithQuality)
def decode_with_quality(model: DetectorWithQuality, outputs: Any) -> DensePredictions:
    """As `decode`, and the third output."""
    return dataclasses.replace(
        decode(model, outputs[:2]),
        anchors=[torch.full((1, 2), 4 * stride) for stride in STRIDES],
        quality=[x.flatten(1) for x in outputs[2]],
    )


def own_predictions(model: Detector, scene: Scene, reuse_from: int) -> DensePredictions:
    """What the teacher predicts from its own features, written out."""
    outputs: list[list[Tensor]] = [[], []]
    for i in range(len(STRIDES)):
        for k, part in enumerate(("cls", "reg")):
            tower = (model.head.cls_subnet, model.head.bbox_subnet)[k]
            x = scene.teacher[part if reuse_from else "features"][i].detach()
            for layer in list(tower)[{0: 0, 1: 1, 2: 4}[reuse_from] :]:
                x = layer[i](x) * layer.weight[:, None, None] if _cycles(layer) else layer(x)
                x = x + layer.bias[:, None, None] if _cycles(layer) else x
            last = (model.head.cls_score, model.head.bbox_pred)[k]
            outputs[k].append(last(x))
    return decode_dense(model, outputs)


def _cycles(layer: nn.Module) -> bool:
    return isinstance(layer, CycleBatchNormList)


class TestCrossKD(DistillerContract):
    name = "CrossKD"
    reuse_from = 1
    options: ClassVar[dict[str, Any]] = {"reuse_from": 1}
    # Statistics are the batch's.
    parts_of_mean = ()
    other: ClassVar[dict[str, Any]] = {
        "HEAD": "dense_head",
        "REUSE_FROM": 0,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "always",
        "CLS_WEIGHT": 0.4,
        "REG_WEIGHT": 0.75,
        "QUALITY_WEIGHT": 0.5,
        "BETA": 2.0,
        "BOX": "log_iou",
        "SCOPE": "image",
        "MASK_PADDING": False,
    }
    # The teacher's convolutions see padding, in its own pass too.
    test_more_padding_changes_nothing_where_padding_is_masked = None  # type: ignore[assignment]
    test_no_gradient_on_padding_where_it_is_masked = None  # type: ignore[assignment]

    def modules(self) -> dict[str, TeacherModule]:
        return {"teacher": TeacherModule(TEACHER, contextlib.nullcontext)}

    def step(self, scene: Scene) -> Step:
        wide = any(x.dtype == torch.float64 for x in scene.leaves("student"))
        model = copy.deepcopy(TEACHER).to(torch.float64 if wide else torch.float32)
        step = scene.step()

        def autocast() -> Any:
            return torch.autocast("cpu", enabled=False)

        step.modules["teacher"] = TeacherModule(model, autocast)
        change = Tensor.double if wide else Tensor.float
        with autocast():
            own = own_predictions(model, scene.maps(change, "teacher"), self.reuse_from)
        step.teacher["predictions"] = own
        return step

    def test_norms_are_left_at_the_first_level(self, scene: Scene) -> None:
        step = self.step(scene)
        self.build()(step)
        norms = [x for x in step.modules["teacher"].module.modules() if _cycles(x)]
        assert norms
        assert all(norm._pos == 0 for norm in norms)

    def test_nothing_of_the_teacher_is_the_distillers(self, scene: Scene) -> None:
        distiller = self.build()
        distiller(self.step(scene))
        assert not list(distiller.parameters())
        assert not distiller.state_dict()

    def test_shift_and_positive_scale_change_nothing(self, scene: Scene) -> None:
        """Where the deviation is not near eps."""
        moved = scene.maps(lambda x: 4 * x - 3, "student")
        torch.testing.assert_close(self.total(moved), self.total(scene), rtol=1e-4, atol=0)


class TestPyramidEnters(TestCrossKD):
    reuse_from = 0
    options: ClassVar[dict[str, Any]] = {"reuse_from": 0}


class TestLastConvolution(TestCrossKD):
    """The norm is before what is captured; one activation and the predictor remain."""

    reuse_from = 2
    options: ClassVar[dict[str, Any]] = {"reuse_from": 2, "box": "log_iou", "scope": "image"}

    def test_norms_are_left_at_the_first_level(self, scene: Scene) -> None:
        super().test_norms_are_left_at_the_first_level(scene)


class TestPositionsOnPadding(TestCrossKD):
    options: ClassVar[dict[str, Any]] = {"reuse_from": 1, "mask_padding": False}

    def test_count_unless_masked(self, scene: Scene) -> None:
        masked = self.total(scene, mask_padding=True)
        full = dataclasses.replace(scene, image_sizes=[(48, 64), (48, 64)])
        assert masked < self.total(scene)
        torch.testing.assert_close(self.total(full, mask_padding=True), self.total(scene))


def test_a_head_without_towers_is_refused() -> None:
    model = Detector()
    del model.head.bbox_pred
    shared = {"teacher": TeacherModule(model, contextlib.nullcontext)}
    with pytest.raises(ValueError, match=r"head \(Head\) has no bbox_pred; take a teacher with"):
        CrossKD().build({}, shared)


def test_levels_that_the_head_does_not_read_are_refused() -> None:
    levels = {"features": [LevelShape("p2~p2", 4.0, 8)]}
    shared = {"teacher": TeacherModule(Detector(), contextlib.nullcontext)}
    with pytest.raises(ValueError, match=r"p2~p2 have stride 4.*strides 8, 16 only; set REUSE"):
        CrossKD(reuse_from=0).build(levels, shared)


def quality_of(head: Head, features: Tensor, level: int) -> Tensor:
    """(N, 1, H, W): the whole boxes' tower, then the quality, written out."""
    for layer in head.bbox_subnet:
        features = layer[level](features) if _cycles(layer) else layer(features)
        if _cycles(layer):
            features = features * layer.weight[:, None, None] + layer.bias[:, None, None]
    quality: Tensor = head.quality(features)
    return quality


def positives_by_hand(boxes: Tensor) -> list[list[bool]]:
    """Positives of ATSS per level, rows of cells; the anchors are squares of 4 strides."""
    anchors, near = [], [[] for _ in boxes]  # type: ignore[var-annotated]
    for (height, width), stride in zip(SIDES, STRIDES, strict=True):
        centres = [
            ((x + 0.5) * stride, (y + 0.5) * stride) for y in range(height) for x in range(width)
        ]
        first = len(anchors)
        anchors += [
            (x - 2 * stride, y - 2 * stride, x + 2 * stride, y + 2 * stride) for x, y in centres
        ]
        for found, (x0, y0, x1, y1) in zip(near, boxes.tolist(), strict=True):
            middle = (x0 + x1) / 2, (y0 + y1) / 2
            order = sorted(range(len(centres)), key=lambda i: math.dist(centres[i], middle))
            found += [first + i for i in order[:9]]
    chosen = [False] * len(anchors)
    for found, box in zip(near, boxes, strict=True):
        overlaps = box_iou(torch.tensor(anchors)[found].double(), box[None].double())[:, 0]
        threshold = overlaps.mean() + overlaps.std()
        for i, overlap in zip(found, overlaps, strict=True):
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            chosen[i] |= bool(overlap >= threshold and inside)
    cells = SIDES[0][0] * SIDES[0][1]
    return [chosen[:cells], chosen[cells:]]


class TestQuality:
    """The boxes' quality at the positives of ATSS, against loops over positions."""

    def step(self, scene: Scene) -> Step:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = DetectorWithQuality().eval().requires_grad_(False)
        step = scene.step()
        outputs: list[list[Tensor]] = [[], [], []]
        for i, x in enumerate(scene.teacher["features"]):
            quality = quality_of(model.head, x.detach(), i)
            outputs[0].append(quality.new_zeros(len(x), K, *x.shape[2:]))
            outputs[1].append(quality.new_zeros(len(x), 4, *x.shape[2:]))
            outputs[2].append(quality)
        step.modules["teacher"] = TeacherModule(model, contextlib.nullcontext)
        step.teacher["predictions"] = decode_dense(model, outputs)
        return step

    def test_is_that_of_the_loops(self) -> None:
        distiller = CrossKD(reuse_from=0, quality_weight=0.5)
        assert distiller.needs_boxes and not CrossKD().needs_boxes
        scene = scene_for(distiller.captures()).maps(Tensor.float)
        step = self.step(scene)
        found = distiller(step)["quality"]
        head, total, count = step.modules["teacher"].module.head, 0.0, 0
        positives = [positives_by_hand(boxes) for boxes in scene.boxes]
        for i, pair in enumerate(step.pairs["features"]):
            cross = quality_of(head, align_statistics(pair.student, pair.teacher), i).flatten(1)
            own = quality_of(head, pair.teacher, i).flatten(1).sigmoid()
            for n in range(len(cross)):
                for r, positive in enumerate(positives[n][i]):
                    if positive and pair.valid()[n].flatten()[r]:
                        q, p = own[n, r].item(), cross[n, r].sigmoid().item()
                        total -= q * math.log(p) + (1 - q) * math.log(1 - p)
                        count += 1
        assert count >= 3
        assert found.item() == pytest.approx(0.5 * total / 3.0, rel=1e-5)  # N+ is 3

    def test_without_objects_it_is_a_zero_on_the_graph(self) -> None:
        distiller = CrossKD(reuse_from=0, quality_weight=0.5)
        assert distiller.needs_boxes and not CrossKD().needs_boxes
        scene = scene_for(distiller.captures()).maps(Tensor.float).empty()
        for x in scene.leaves("student"):
            x.requires_grad_()
        found = distiller(self.step(scene))["quality"]
        assert found.item() == 0 and found.requires_grad

    def test_a_teacher_that_says_nothing_of_its_boxes_is_refused(self) -> None:
        shared = {"teacher": TeacherModule(Detector(), contextlib.nullcontext)}
        message = r"QUALITY_WEIGHT is 0.5, but the teacher's head \(Head\) does not say how good"
        with pytest.raises(ValueError, match=message):
            CrossKD(quality_weight=0.5).build({}, shared)
