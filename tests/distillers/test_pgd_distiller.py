"""PGD: masks from the teacher's predictions, terms per level; the parts are `functional`'s."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
import tiny_runs
import torch
from contract import (
    BOXES,
    CLASSES,
    IMAGE_SIZES,
    SIDES,
    STRIDES,
    DistillerContract,
    Scene,
    make_scene,
)
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from torch import Tensor

from kd_det.distillers import PGD, LevelShape, Pair, Step
from kd_det.functional.gaussian_importance import ImportanceOptions, importance_maps
from kd_det.functional.level_grid import Grid, positions_in_boxes, positions_in_images
from kd_det.functional.pgd import classification_terms, regression_terms

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]
LEVELS = [Grid(height, width, s) for (height, width), s in zip(SIDES, STRIDES, strict=True)]


class TestPGD(DistillerContract):
    name = "PGD"
    # All positions of the small scene would be selected by 30.
    options: ClassVar[dict[str, Any]] = {"top_k": 6}
    # Regression is averaged over the positions of the whole batch, as published.
    parts_of_mean = ("cls",)
    other: ClassVar[dict[str, Any]] = {
        "FEATURES": "neck",
        "CLS_TOWER": "head.class_tower",
        "REG_TOWER": "head.box_tower",
        "TOWER_BLOCK": 1,
        "ADAPTER": "always",
        "ALPHA": 0.1,
        "BETA": 0.2,
        "GAMMA": 0.3,
        "DELTA": 0.4,
        "LEVEL_WEIGHTS": [1.0, 2.0],
        "TAU": 0.4,
        "FOREGROUND": "center",
        "TOP_K": 9,
        "XI_CLS": 0.7,
        "XI_REG": 0.5,
        "GATE": "after",
        "MASK_PADDING": False,
        "MASK_IGNORED": True,
        "MASK_SCOPE": "batch",
        "ASSIGN_FROM_TEACHER": True,
    }


class TestNeck(TestPGD):
    options: ClassVar[dict[str, Any]] = {"features": "neck", "top_k": 6}


class TestCoupledHead(TestPGD):
    options: ClassVar[dict[str, Any]] = {"reg_tower": "", "gate": "after", "top_k": 6}


class TestCenters(TestPGD):
    options: ClassVar[dict[str, Any]] = {"foreground": "center"}


class TestBatchMasks(TestPGD):
    options: ClassVar[dict[str, Any]] = {"mask_scope": "batch", "top_k": 6}
    # The release weights each image by all images' masks.
    parts_of_mean = ()


@pytest.fixture
def scene() -> Scene:
    return make_scene(("cls", "reg"))


def padded_boxes() -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, classes and which of them exist: two in the first image, one in the second."""
    boxes = torch.zeros(2, 2, 4)
    classes = torch.zeros(2, 2, dtype=torch.int64)
    boxes[0], boxes[1, 0] = BOXES[0], BOXES[1][0]
    classes[0], classes[1, 0] = CLASSES[0], CLASSES[1][0]
    return boxes, classes, torch.tensor([[True, True], [True, False]])


def composed_by_hand(scene: Scene) -> dict[str, Tensor]:
    """
    The published loss, written out for the two levels.

    Of the boxes' positions only 6 are selected: with all of them, both masks would be equal.
    """
    predictions = scene.predictions()
    boxes, classes, present = padded_boxes()
    valid = positions_in_images(LEVELS, IMAGE_SIZES)
    of_cls, of_reg = importance_maps(
        torch.cat(predictions.logits, 1),
        torch.cat(predictions.boxes, 1),
        boxes,
        classes,
        present,
        LEVELS,
        ImportanceOptions(exponents=(0.8, 0.6), top_k=6, gate="before"),
        position_valid=valid,
    )
    background = ~positions_in_boxes(LEVELS, boxes, present)
    cls, reg = torch.zeros(()), torch.zeros(())
    start = 0
    for i, ((height, width), weight) in enumerate(zip(SIDES, (1.0, 1.25), strict=True)):
        part = slice(start, start + height * width)
        start += height * width
        grid = (2, height, width)
        c = classification_terms(
            scene.student["cls"][i],
            scene.teacher["cls"][i],
            of_cls[:, part].reshape(grid),
            background[:, part].reshape(grid),
            tau=0.8,
            valid=valid[:, part].reshape(grid),
        )
        cls = cls + weight * (0.04 * c.foreground + 0.02 * c.background) + 0.0008 * c.attention
        r = regression_terms(
            scene.student["reg"][i],
            scene.teacher["reg"][i],
            of_reg[:, part].reshape(grid),
            tau=0.8,
        )
        reg = reg + 0.064 * r.foreground + 0.0008 * r.attention
    return {"cls": cls, "reg": reg}


def test_is_the_functional_terms_composed_by_hand(scene: Scene) -> None:
    losses = PGD(top_k=6)(scene.step())
    expected = composed_by_hand(scene)
    assert losses.keys() == expected.keys()
    for part, value in losses.items():
        torch.testing.assert_close(value, expected[part], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("key", "value"), [("alpha", 0.08), ("beta", 0.04), ("gamma", 0.128), ("delta", 0.0016)]
)
def test_each_weight_scales_its_own_part(scene: Scene, key: str, value: float) -> None:
    """The loss is linear in the weights: doubling one adds its share, and the shares add up."""
    base = {k: v.item() for k, v in PGD()(scene.step()).items()}
    zero = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "delta": 0.0}
    default = {"alpha": 0.04, "beta": 0.02, "gamma": 0.064, "delta": 0.0008}
    alone = PGD(**{**zero, key: default[key]})(scene.step())
    doubled = PGD(**{key: value})(scene.step())
    for part in base:
        assert doubled[part].item() - base[part] == pytest.approx(alone[part].item(), rel=1e-6)
    touched = {part for part in alone if alone[part].item() > 0}
    assert touched == {"alpha": {"cls"}, "beta": {"cls"}, "gamma": {"reg"}}.get(key, {"cls", "reg"})


def test_level_weights_scale_the_features_of_their_level(scene: Scene) -> None:
    options = {"delta": 0.0, "gamma": 0.0}
    fine, coarse = (
        PGD(level_weights=w, **options)(scene.step())["cls"] for w in ((1.0, 0.0), (0.0, 1.0))
    )
    both = PGD(level_weights=(3.0, 5.0), **options)(scene.step())["cls"]
    torch.testing.assert_close(both, 3 * fine + 5 * coarse)
    assert min(fine, coarse) > 0
    # More weights than levels: the first are used, from fine to coarse.
    assert PGD(level_weights=(3.0, 5.0, 9.0), **options)(scene.step())["cls"] == both


def test_too_few_level_weights(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"LEVEL_WEIGHTS has 1 entries, but 2 levels are paired"):
        PGD(level_weights=(1.0,))(scene.step())


def test_level_weights_and_strides_are_checked_when_the_model_is_built() -> None:
    levels = [LevelShape(f"p{i}", 2.0**i, 8) for i in (3, 4, 5)]
    built = {"cls": levels, "reg": levels, "predictions": levels}
    PGD(level_weights=(1.0, 1.0, 1.0)).build(built, {})
    with pytest.raises(ValueError, match=r"LEVEL_WEIGHTS has 2 entries, but 3 levels are paired"):
        PGD(level_weights=(1.0, 1.0)).build(built, {})
    with pytest.raises(ValueError, match=r"levels p3 have stride 8, but .* strides 16, 32 only"):
        PGD().build({**built, "predictions": levels[1:]}, {})


def test_coupled_head_has_the_classification_part_alone(scene: Scene) -> None:
    coupled = PGD(reg_tower="")
    assert [spec.name for spec in coupled.captures()] == ["cls", "predictions"]
    step = scene.step()
    del step.pairs["reg"]
    assert coupled(step) == {"cls": PGD()(scene.step())["cls"]}


def test_captures() -> None:
    specs = PGD(cls_tower="head.a", reg_tower="head.b", tower_block=1).captures()
    assert [(s.name, s.student, s.teacher, s.kind) for s in specs] == [
        ("cls", "head.a#1", "head.a#1", "pyramid"),
        ("reg", "head.b#1", "head.b#1", "pyramid"),
        ("predictions", None, "head", "predictions"),
    ]
    neck = PGD(features="neck").captures()
    assert [(s.name, s.student, s.teacher) for s in neck] == [
        ("cls", "backbone", "backbone"),
        ("predictions", None, "head"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "fpn"}, r"FEATURES is 'fpn', expected 'towers' or 'neck'"),
        ({"foreground": "edge"}, r"FOREGROUND is 'edge', expected 'prediction' or 'box' or"),
        ({"gate": "never"}, r"GATE is 'never', expected 'before' or 'after'"),
        ({"mask_scope": "world"}, r"MASK_SCOPE is 'world', expected 'image' or 'batch'"),
        ({"alpha": -1.0}, r"ALPHA is -1\.0, expected a number from 0"),
        ({"delta": math.nan}, "DELTA is nan"),
        ({"level_weights": (1.0, -2.0)}, r"LEVEL_WEIGHTS\[1\] is -2\.0"),
        ({"tau": 0.0}, r"TAU is 0\.0, expected a number from 1e-06"),
        ({"top_k": 0}, "TOP_K is 0, expected a number from 1"),
        ({"tower_block": -1}, "TOWER_BLOCK is -1"),
        ({"xi_cls": 1.5}, r"XI_CLS is 1\.5, expected a number from 0 to 1"),
        ({"xi_reg": -0.5}, r"XI_REG is -0\.5"),
    ],
)
def test_values_out_of_range_are_refused_when_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"KD\.PGD\.{message}"):
        PGD(**options)


def test_nothing_waits_for_the_device(scene: Scene) -> None:
    """Tensors without data stand for a device: whatever needed a value of them would raise."""
    step = scene.step()

    def away(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        return [away(x) for x in value] if isinstance(value, list) else value

    predictions = step.teacher["predictions"]
    fields = {f.name: away(getattr(predictions, f.name)) for f in dataclasses.fields(predictions)}
    step.teacher["predictions"] = dataclasses.replace(predictions, **fields)
    step.pairs = {
        name: [
            Pair(
                pair.name,
                pair.stride,
                away(pair.student).requires_grad_(),
                away(pair.teacher),
                away(pair.image_sizes),
            )
            for pair in pairs
        ]
        for name, pairs in step.pairs.items()
    }
    for options in ({}, {"gate": "after", "mask_scope": "batch", "mask_ignored": True}):
        losses = PGD(**options)(step)  # type: ignore[arg-type]
        assert all(loss.is_meta for loss in losses.values())
        sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(pair.student.grad is not None for pair in step.pairs["cls"])


class TestMasks:
    def test_by_geometry(self, scene: Scene) -> None:
        step = scene.step()
        masks = PGD(top_k=6).masks(step.teacher["predictions"], step.targets)
        for importance in (masks.cls, masks.reg):
            for i, (x, stride) in enumerate(zip(importance, STRIDES, strict=True)):
                assert x.shape == (2, *SIDES[i])
                assert 0 < x.max() <= 1
                for n in range(2):
                    inside = self.inside(BOXES[n], SIDES[i], stride)
                    assert not x[n][~inside].any()
                    assert torch.equal(masks.background[i][n], ~inside)
        assert [x[1].sum().item() for x in masks.valid] == [4 * 5, 2 * 2]
        assert all(x[0].all() for x in masks.valid)
        # The two exponents select and weigh differently.
        assert not torch.equal(masks.cls[0], masks.reg[0])

    @pytest.mark.parametrize(("foreground", "reach"), [("box", math.inf), ("center", 1.5)])
    def test_foreground_of_the_boxes_alone(
        self, scene: Scene, foreground: Literal["box", "center"], reach: float
    ) -> None:
        step = scene.step()
        distiller = PGD(foreground=foreground)
        masks = distiller.masks(step.teacher["predictions"], step.targets)
        for i, (side, stride) in enumerate(zip(SIDES, STRIDES, strict=True)):
            for n, boxes in enumerate(BOXES):
                center = (boxes[:, :2] + boxes[:, 2:]) / 2
                low = (center - reach * stride).maximum(boxes[:, :2])
                high = (center + reach * stride).minimum(boxes[:, 2:])
                expected = self.inside(torch.cat([low, high], 1), side, stride)
                assert torch.equal(masks.cls[i][n], (expected & masks.valid[i][n]).float())
                assert torch.equal(masks.background[i][n], ~self.inside(boxes, side, stride))
            assert torch.equal(masks.cls[i], masks.reg[i])
        assert any(x.any() for x in masks.cls)

    @staticmethod
    def inside(boxes: Tensor, size: tuple[int, int], stride: float) -> Tensor:
        out = torch.zeros(size, dtype=torch.bool)
        for row in range(size[0]):
            for column in range(size[1]):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                out[row, column] = any(
                    x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in boxes.tolist()
                )
        return out

    def test_ignored_regions_are_no_background_on_request(self, scene: Scene) -> None:
        step = scene.step()
        corner = torch.tensor([[40.0, 0.0, 64.0, 24.0]])
        step.targets = dataclasses.replace(step.targets, ignored=[corner, torch.zeros(0, 4)])
        predictions = step.teacher["predictions"]
        plain = PGD().masks(predictions, step.targets).background
        masked = PGD(mask_ignored=True).masks(predictions, step.targets).background
        for i, stride in enumerate(STRIDES):
            ignored = self.inside(corner, SIDES[i], stride)
            assert torch.equal(masked[i][0], plain[i][0] & ~ignored)
            assert torch.equal(masked[i][1], plain[i][1])
        assert not torch.equal(masked[0], plain[0])
        losses = [PGD(mask_ignored=flag)(step)["cls"] for flag in (False, True)]
        assert losses[0] != losses[1]
        # Detectron2's own mapper does not say.
        step.targets = dataclasses.replace(step.targets, ignored=[])
        PGD()(step)
        with pytest.raises(ValueError, match=r"MASK_IGNORED is True, but .*CheckedDatasetMapper"):
            PGD(mask_ignored=True)(step)

    def test_without_objects_everything_is_background(self, scene: Scene) -> None:
        step = scene.empty().step()
        masks = PGD().masks(step.teacher["predictions"], step.targets)
        assert not any(x.any() for x in (*masks.cls, *masks.reg))
        assert all(x.all() for x in masks.background)
        losses = PGD()(step)
        assert losses["reg"] == 0
        assert losses["cls"] > 0


def regrid(step: Step, name: str, stride: float, side: tuple[int, int]) -> None:
    """Replace the pairs of a capture by one of another grid, as KD.RESAMPLE_LEVELS gives it."""
    (old, _) = step.pairs[name]
    maps = (torch.nn.functional.interpolate(x, size=side) for x in (old.student, old.teacher))
    step.pairs[name] = [Pair("p~p", stride, *maps, old.image_sizes)]


class TestOtherGrids:
    def test_a_resampled_pair_reads_the_masks_at_its_own_cells(self, scene: Scene) -> None:
        """Cells of 12 px have their centres, 6, 18, 30, ..., in the cells 0, 1, 1, ... of 16 px."""
        step = scene.step()
        for name in ("cls", "reg"):
            regrid(step, name, 12.0, (4, 5))
        losses = PGD()(step)
        masks = PGD().masks(step.teacher["predictions"], step.targets)
        (pair,) = step.pairs["cls"]

        def at(mask: Tensor) -> Tensor:
            return mask[:, [0, 1, 1, 2]][:, :, [0, 1, 1, 2, 3]]

        terms = classification_terms(
            pair.student,
            pair.teacher,
            at(masks.cls[1]),
            at(masks.background[1]),
            valid=at(masks.valid[1]),
        )
        assert losses["cls"] == terms.weighted(0.04, 0.02, 0.0008)
        (pair,) = step.pairs["reg"]
        reg = regression_terms(pair.student, pair.teacher, at(masks.reg[1]))
        assert losses["reg"] == reg.weighted(0.064, 0.0008)

    def test_levels_of_equal_size_are_told_apart_by_their_stride(self, scene: Scene) -> None:
        """On tiny images p6 and p7 both have one cell."""
        step = scene.step()
        predictions = step.teacher["predictions"]
        step.teacher["predictions"] = dataclasses.replace(
            predictions,
            logits=[x[:, :1] for x in predictions.logits],
            boxes=[x[:, :1] for x in predictions.boxes],
            sizes=[(1, 1), (1, 1)],
        )
        for name in ("cls", "reg"):
            for pair in step.pairs[name]:
                pair.student, pair.teacher = pair.student[..., :1, :1], pair.teacher[..., :1, :1]
        distiller = PGD(mask_padding=False)
        masks = distiller.masks(step.teacher["predictions"], step.targets)
        pair = step.pairs["cls"].pop()
        step.pairs["cls"] = [pair]
        losses = [
            classification_terms(
                pair.student, pair.teacher, masks.cls[i], masks.background[i], valid=masks.valid[i]
            ).weighted(0.04, 0.02, 0.0008)
            for i in range(2)
        ]
        assert losses[0] != losses[1]
        assert distiller(step)["cls"] == losses[1]

    def test_a_pair_without_predictions_is_named(self, scene: Scene) -> None:
        """A neck with P2 below a head that starts at P3."""
        step = scene.step()
        regrid(step, "cls", 4.0, (12, 16))
        with pytest.raises(ValueError, match=r"p~p have stride 4, but the teacher .* 8, 16 only"):
            PGD()(step)


def built(
    student: str, teacher: TinyTeacher, make: Student, keys: dict[str, Any] | None = None
) -> tuple[Any, CfgNode]:
    cfg = make(student, teacher, {"KD.DISTILLERS": ["PGD"], **(keys or {})})
    return build_model(cfg), cfg


def run(model: Any, cfg: CfgNode, records: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Step]:
    """Run a training step, with the teacher's inference forbidden; return what PGD was given."""
    steps: list[Step] = []
    model.active["PGD"].distiller.register_forward_pre_hook(lambda m, args: steps.append(args[0]))

    def fail(*args: Any) -> None:
        raise AssertionError("the teacher went on to inference")

    model.teacher.model.forward_inference = fail
    if hasattr(model.teacher.model.head, "ctrness"):
        # FCOS from random weights predicts boxes without area, which overlap nothing.
        torch.nn.init.constant_(model.teacher.model.head.bbox_pred.bias, 2.0)
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, records))
    return losses, steps[0]


def gradient_at(parameter: Tensor, loss: Tensor) -> float:
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    return float(gradient.abs().sum())


@pytest.mark.parametrize("student", ["faster_rcnn", "mask_rcnn"])
def test_neck_of_a_two_stage_student_of_a_dense_teacher(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    tiny_records: list[dict[str, Any]],
    student: str,
) -> None:
    """The students' P3..P6 learn where FCOS predicts well."""
    model, cfg = built(student, tiny_teacher("fcos"), tiny_student, {"KD.PGD.FEATURES": "neck"})
    losses, step = run(model, cfg, tiny_records)
    assert {key for key in losses if "kd" in key} == {"loss_kd_pgd_cls"}
    assert [pair.name for pair in step.pairs["cls"]] == ["p3~p3", "p4~p4", "p5~p5", "p6~p6"]
    loss = losses["loss_kd_pgd_cls"]
    assert torch.isfinite(loss)
    assert gradient_at(model.student.backbone.fpn_lateral3.weight, loss) > 0
    masks = model.active["PGD"].distiller.masks(step.teacher["predictions"], step.targets)
    assert masks.cls[0].any()


def test_towers_of_detectors_with_several_anchors(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    """RetinaNet predicts 9 boxes at each position; towers and masks have one value there."""
    model, cfg = built("retinanet", tiny_teacher("retinanet"), tiny_student)
    losses, step = run(model, cfg, tiny_records)
    predictions = step.teacher["predictions"]
    for (height, width), logits, pair in zip(
        predictions.sizes, predictions.logits, step.pairs["cls"], strict=True
    ):
        assert logits.shape[1] == 9 * height * width
        assert pair.student.shape[-2:] == pair.teacher.shape[-2:] == (height, width)
    masks = model.active["PGD"].distiller.masks(predictions, step.targets)
    assert [x.shape[1:] for x in masks.cls] == [torch.Size(size) for size in predictions.sizes]
    assert masks.cls[0].any()
    head = model.student.head
    for part, own, alien in (
        ("cls", head.cls_subnet, head.bbox_subnet),
        ("reg", head.bbox_subnet, head.cls_subnet),
    ):
        loss = losses[f"loss_kd_pgd_{part}"]
        assert gradient_at(own[0].weight, loss) > 0
        with pytest.raises(RuntimeError, match=r"not have been used in the graph"):
            gradient_at(alien[0].weight, loss)


def test_half_view_student(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    """The student's towers on P2..P6 of half the image, the teacher's on P3..P7."""
    keys = {
        "KD.STUDENT.VIEW_FACTOR": 2.0,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "p6_c5",
        "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    }
    model, cfg = built("fcos", tiny_teacher("fcos"), tiny_student, keys)
    losses, step = run(model, cfg, tiny_records)
    assert [pair.stride for pair in step.pairs["cls"]] == [8, 16, 32, 64, 128]
    for part in ("cls", "reg"):
        assert torch.isfinite(losses[f"loss_kd_pgd_{part}"])
        assert losses[f"loss_kd_pgd_{part}"] > 0


def test_a_view_that_needs_resampling(
    tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    keys = {"KD.STUDENT.VIEW_FACTOR": 1.25, "KD.RESAMPLE_LEVELS": True}
    model, cfg = built("fcos", tiny_teacher("fcos"), tiny_student, keys)
    losses, step = run(model, cfg, tiny_records)
    assert [pair.stride for pair in step.pairs["cls"]] == [10, 20, 40, 80, 160]
    for part in ("cls", "reg"):
        assert torch.isfinite(losses[f"loss_kd_pgd_{part}"])
        assert losses[f"loss_kd_pgd_{part}"] > 0


def test_a_student_without_towers_is_told_so(
    tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    with pytest.raises(ValueError, match=r"GeneralizedRCNN has no module 'head.cls_subnet'"):
        built("faster_rcnn", tiny_teacher("fcos"), tiny_student)
