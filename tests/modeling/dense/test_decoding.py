"""The decoder of each detector gives what the detector decodes itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.structures import ImageList
from tiny_dense import CLASSES, build_tiny
from torch import Tensor, nn

from kd_det.distillers.predictions import decoder_of
from kd_det.modeling.dense.single_prediction import SinglePredictionDetector

SIZES = [(8, 12), (4, 6), (2, 3)]
ATSS_IOU = ("MODEL.ATSS.QUALITY_BRANCH", "iou")
# Two anchors per position.
RETINANET = ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.0], [64.0], [128.0]])
RETINANET += ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 2.0]])
DETECTORS = [("fcos", ()), ("retinanet", RETINANET), ("atss", ()), ("atss", ATSS_IOU), ("gfl", ())]
DETECTORS += [("autoassign", ()), ("ddod", ()), ("fsaf", ()), ("reppoints", ())]
# A score is the root of class times quality; here the product itself.
WITHOUT_ROOT = ("autoassign", "ddod")
every_detector = pytest.mark.parametrize(("name", "opts"), DETECTORS)


def make_features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 16, h, w, generator=generator) for h, w in SIZES]


def build_lively(name: str, opts: tuple[Any, ...]) -> tuple[nn.Module, list[Tensor], Any]:
    """A detector whose fresh head has been made to predict scores and boxes of all kinds."""
    model = build_tiny(name, *opts).eval()
    with torch.no_grad():
        for conv in (model.head.cls_score, model.head.bbox_pred):
            conv.weight.mul_(30)
            nn.init.normal_(conv.bias, std=0.5)
    features = make_features()
    with torch.no_grad():
        return model, features, model.head(features)


def keep_everything(model: nn.Module) -> None:
    if isinstance(model, SinglePredictionDetector):
        everything = {"score_thresh_test": 0.0, "topk_candidates_test": 10**6}
        model.options = replace(model.options, nms_thresh_test=1.1, **everything)
        model.max_detections = 50
    else:
        model.test_score_thresh, model.test_topk_candidates = 0.0, 10**6
        model.test_nms_thresh, model.max_detections_per_image = 1.1, 50


@every_detector
def test_boxes_are_those_the_detector_decodes(name: str, opts: tuple[Any, ...]) -> None:
    model, features, outputs = build_lively(name, opts)
    decoded = decoder_of(model)(outputs)
    keep_everything(model)
    images = ImageList(torch.zeros(2, 3, 64, 96), [(64, 96)] * 2)
    # Detectron2's FCOS applies the sigmoid in place.
    copies = [[x.clone() for x in levels] for levels in outputs]
    with torch.no_grad():
        results = model.forward_inference(images, features, copies)
    probabilities = torch.cat(decoded.logits, dim=1).sigmoid()
    if len(outputs) == 3 and name != "reppoints":
        quality = torch.cat([x.flatten(1) for x in outputs[2]], dim=1).sigmoid()
        probabilities = probabilities * quality[..., None]
        probabilities = probabilities if name in WITHOUT_ROOT else probabilities.sqrt()
    boxes = torch.cat(decoded.boxes, dim=1)
    for image, found in enumerate(results):
        scores, order = probabilities[image].flatten().sort(descending=True)
        torch.testing.assert_close(found.scores, scores[:50])
        assert torch.equal(found.pred_classes, order[:50] % CLASSES)
        torch.testing.assert_close(found.pred_boxes.tensor, boxes[image, order[:50] // CLASSES])
    assert boxes.min() < 0, "the case must have boxes that a clip would change"


@every_detector
def test_shapes_offsets_and_strides(name: str, opts: tuple[Any, ...]) -> None:
    model, _, outputs = build_lively(name, opts)
    decoded = decoder_of(model)(outputs)
    anchors = 2 if name == "retinanet" else 1
    # Detectron2's FCOS centres its anchors in their cells; the others' default offset is 0.
    offset = 0.5 if name == "fcos" else 0.0
    assert decoded.strides == [8.0, 16.0, 32.0]
    assert decoded.sizes == SIZES
    assert decoded.offset == offset
    for level, (height, width) in enumerate(SIZES):
        rows = height * width * anchors
        assert decoded.logits[level].shape == (2, rows, CLASSES)
        assert decoded.boxes[level].shape == (2, rows, 4)
        # RepPoints' third output is no quality, but its first points.
        if len(outputs) == 3 and name not in ("reppoints", "fcos"):
            assert decoded.quality is not None and decoded.quality[level].shape == (2, rows)
        else:
            assert decoded.quality is None


@every_detector
def test_outputs_stay_and_gradients_flow(name: str, opts: tuple[Any, ...]) -> None:
    model, features, _ = build_lively(name, opts)
    outputs = model.train().head(features)
    before = [[x.detach().clone() for x in levels] for levels in outputs]
    decoded = decoder_of(model)(outputs)
    (torch.cat(decoded.logits, 1).sum() + torch.cat(decoded.boxes, 1).sum()).backward()
    assert model.head.cls_score.weight.grad.any() and model.head.bbox_pred.weight.grad.any()
    for levels, copies in zip(outputs, before, strict=True):
        assert all(torch.equal(x, copy) for x, copy in zip(levels, copies, strict=True))


@every_detector
def test_boxes_are_float32_under_autocast(name: str, opts: tuple[Any, ...]) -> None:
    model, _, outputs = build_lively(name, opts)
    half = [[x.bfloat16() for x in levels] for levels in outputs]
    rounded = [[x.float() for x in levels] for levels in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder_of(model)(half)
    for boxes, expected in zip(found.boxes, decoder_of(model)(rounded).boxes, strict=True):
        torch.testing.assert_close(boxes, expected)


def test_levels_with_different_numbers_of_anchors_are_refused() -> None:
    model, _, outputs = build_lively("retinanet", RETINANET)
    outputs[0][1] = outputs[0][1][:, :CLASSES]
    outputs[1][1] = outputs[1][1][:, :4]
    anchors = dict(model.anchor_generator.cell_anchors.named_buffers())
    setattr(model.anchor_generator.cell_anchors, "1", anchors["1"][:1])
    with pytest.raises(ValueError, match=r"different numbers of anchors .*: \[2, 1, 2\]"):
        decoder_of(model)(outputs)
