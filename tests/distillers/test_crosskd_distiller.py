"""CrossKD with a small teacher's head; `functional.crosskd` has tests of its own."""

import contextlib
import copy
import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from contract import CHANNELS, STRIDES, DistillerContract, K, Scene
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn

import kd_det.modeling.dense.decoding  # noqa: F401
from kd_det.distillers import CrossKD, LevelShape, Step, TeacherModule
from kd_det.distillers.predictions import DensePredictions, decode_dense, register_decoder


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
