"""What holds of every dense detector: batches without objects, AMP, learning, building."""

from typing import Any

import pytest
import torch
from detectron2.structures import Instances, pairwise_iou
from tiny_dense import build_tiny, losses_of, make_image, no_objects, overfit, two_images
from torch import nn

from kd_det.modeling.dense.autoassign import AutoAssign
from kd_det.modeling.dense.ddod import DDOD
from kd_det.modeling.dense.fsaf import FSAF
from kd_det.modeling.dense.reppoints import RepPoints
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector
from kd_det.modeling.msad.heads import heads_of

# Detector, keys of its node, its losses of boxes; "cls" is that of the background.
VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("atss", {"QUALITY_BRANCH": "centerness"}, ("loc", "quality")),
    ("atss", {"QUALITY_BRANCH": "iou"}, ("loc", "quality")),
    ("atss", {"QUALITY_BRANCH": "iou_weighted"}, ("loc", "quality")),
    ("gfl", {"REG_MAX": 4}, ("loc", "dfl")),
    ("autoassign", {}, ("pos", "center")),
    ("ddod", {"ASSIGNER": "atss"}, ("loc", "quality")),
    ("ddod", {"ASSIGNER": "topk"}, ("loc", "quality")),
    ("reppoints", {"TRANSFORM": "moment"}, ("init", "refine")),
    ("reppoints", {"TRANSFORM": "minmax"}, ("init", "refine")),
    ("reppoints", {"TRANSFORM": "partial_minmax"}, ("init", "refine")),
    ("fsaf", {}, ("loc",)),
]
NAMES = sorted({name for name, _, _ in VARIANTS})
# Those whose assignment follows from what they predict.
BY_PREDICTIONS: dict[str, type[SinglePredictionDetector]] = {
    "autoassign": AutoAssign,
    "ddod": DDOD,
    "fsaf": FSAF,
    "reppoints": RepPoints,
}


def build(name: str, keys: dict[str, Any]) -> nn.Module:
    opts = [x for key, value in keys.items() for x in (f"MODEL.{name.upper()}.{key}", value)]
    return build_tiny(name, *opts)


def fresh_losses(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """Losses of a model that has not trained a step: no moving average, no counts of levels."""
    if isinstance(model, DDOD):
        model.level_counts.zero_()
    return losses_of(model, batch)


@pytest.mark.parametrize("batch", [[no_objects()], [no_objects(), two_images()[0]]])
@pytest.mark.parametrize(("name", "keys", "of_boxes"), VARIANTS)
def test_images_without_objects(
    name: str, keys: dict[str, Any], of_boxes: tuple[str, ...], batch: list[dict]
) -> None:
    model = build(name, keys)
    losses = losses_of(model, batch)
    sum(losses.values()).backward()
    for parameter_name, parameter in model.head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    if len(batch) == 1:
        background = "neg" if name == "autoassign" else "cls"
        assert set(losses) == {f"loss_{name}_{part}" for part in (*of_boxes, background)}
        assert all(losses[f"loss_{name}_{part}"] == 0 for part in of_boxes)
        assert losses[f"loss_{name}_{background}"] > 0
        assert not model.head.bbox_pred.weight.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_float32_under_autocast(name: str) -> None:
    model = build_tiny(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fresh_losses(model, two_images())
    full = fresh_losses(model, two_images())
    assert all(loss.dtype == torch.float32 for loss in half.values())
    # Of a quality, small differences decide which positions DDOD takes for boxes.
    compared = ["loss_ddod_cls"] if name == "ddod" else list(full)
    for key in compared:
        rel = 0.1 if name == "ddod" else 0.05
        assert half[key].item() == pytest.approx(full[key].item(), rel=rel), key


@pytest.mark.parametrize(
    ("name", "keys", "steps"),
    [
        ("atss", {"QUALITY_BRANCH": "iou"}, 50),
        ("autoassign", {}, 25),
        ("ddod", {}, 50),
        ("fsaf", {}, 30),
        # Its first boxes are tiny, so that it takes longer than others.
        pytest.param("reppoints", {}, 200, marks=pytest.mark.slow),
    ],
)
def test_learns_two_images(name: str, keys: dict[str, Any], steps: int) -> None:
    model, batch = build(name, keys), two_images()
    totals = overfit(model, batch, steps=steps)
    assert totals[-1] < 0.5 * totals[0]
    model.eval()
    with torch.no_grad():
        results = model(batch)
    for found, image in zip(results, batch, strict=True):
        best = found["instances"][: len(image["instances"])]
        iou, match = pairwise_iou(best.pred_boxes, image["instances"].gt_boxes).max(dim=1)
        assert (iou > 0.6).all()
        assert torch.equal(best.pred_classes, image["instances"].gt_classes[match])


def test_losses_of_reppoints_fall() -> None:
    totals = overfit(build_tiny("reppoints"), two_images(), steps=30)
    assert totals[-1] < 0.5 * totals[0]


@pytest.mark.parametrize("name", ["ddod", "reppoints"])
def test_images_of_different_sizes(name: str) -> None:
    """Cells on padding are background: the losses are those of one padded by hand."""
    small, large = make_image([[4, 4, 40, 36]], [0]), two_images()[0]
    large["image"] = nn.functional.pad(large["image"], (0, 32, 0, 32))
    large["instances"] = Instances((96, 128), **large["instances"].get_fields())
    model = build_tiny(name)
    losses = {k: v.item() for k, v in fresh_losses(model, [small, large]).items()}
    # The mean of the channels is what padding is after normalising.
    canvas = model.pixel_mean.expand(3, 96, 128).clone()
    canvas[:, :64, :96] = small["image"]
    padded = {"image": canvas, "instances": Instances((96, 128), **small["instances"].get_fields())}
    found = {k: v.item() for k, v in fresh_losses(model, [padded, large]).items()}
    assert found == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", BY_PREDICTIONS)
def test_imported_with_arguments_instead_of_a_config(name: str) -> None:
    built, detector = build_tiny(name), BY_PREDICTIONS[name]
    options = detector.options_type(num_classes=3, num_convs=1, in_features=["p3", "p4", "p5"])
    model = detector(
        backbone=built.backbone,
        head=detector.build_head(options, [built.backbone.output_shape()["p3"]] * 3),
        options=options,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    assert model.state_dict().keys() == built.state_dict().keys()
    assert losses_of(model, two_images()).keys() == losses_of(built, two_images()).keys()


@pytest.mark.parametrize("name", BY_PREDICTIONS)
def test_no_aligned_teacher_shares_targets_that_depend_on_predictions(name: str) -> None:
    words = rf"names a {BY_PREDICTIONS[name].__name__}, which does not say that it assigns"
    with pytest.raises(TypeError, match=words):
        heads_of(build_tiny(name))
