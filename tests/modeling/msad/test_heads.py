"""Branches share their targets where the detector's assignment lets them, and only there."""

from typing import Any, ClassVar

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS as StockFCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from tiny_aligned import HIGH, batch, detector_cfg
from torch import nn

from kd_det.modeling.dense.atss import ATSS
from kd_det.modeling.dense.fcos import FCOS
from kd_det.modeling.dense.gfl import GFL
from kd_det.modeling.msad.heads import assigns_from_anchors, heads_of


class OtherHead(ATSS):
    def scores(self, probabilities: Any, quality: Any) -> Any:
        return probabilities


class ByPrediction(ATSS):
    """DDOD, AutoAssign: targets depend on what is predicted."""

    def forward_training(self, *args: Any) -> Any:
        return super().forward_training(*args)


class ByLoss(GFL):
    def losses_of_batch(self, *args: Any) -> Any:
        return super().losses_of_batch(*args)


class OtherMatching(RetinaNet):
    def label_anchors(self, anchors: Any, gt_instances: Any) -> Any:
        return super().label_anchors(anchors, gt_instances)


class Declared(OtherMatching):
    assigns_from_anchors: ClassVar[bool] = True


class Withdrawn(FCOS):
    assigns_from_anchors: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("detector", "expected"),
    [
        *[(cls, True) for cls in (RetinaNet, StockFCOS, FCOS, ATSS, GFL, OtherHead, Declared)],
        *[(cls, False) for cls in (DenseDetector, ByPrediction, ByLoss, OtherMatching, Withdrawn)],
    ],
)
def test_a_declaration_holds_for_the_methods_it_was_made_for(
    detector: type[nn.Module], expected: bool
) -> None:
    assert assigns_from_anchors(detector) is expected


def test_a_detector_that_assigns_by_its_predictions_is_refused() -> None:
    model = build_model(detector_cfg("ATSS", HIGH))
    model.__class__ = ByPrediction
    with pytest.raises(TypeError, match=r"names a ByPrediction, .* assigns_from_anchors = True"):
        heads_of(model)


def test_another_proposal_generator_is_refused() -> None:
    model = build_model(detector_cfg("Faster", HIGH))
    model.proposal_generator = nn.Identity()
    with pytest.raises(TypeError, match=r"PROPOSAL_GENERATOR\.NAME is Identity"):
        heads_of(model)


def test_only_the_same_grids_and_ground_truth_share() -> None:
    model = build_model(detector_cfg("RetinaNet", HIGH))
    anchors = [Boxes(torch.rand(n, 4)) for n in (6, 2)]
    first, second = ([item["instances"]] for item in batch())
    with heads_of(model).same_targets():
        labels, _ = model.label_anchors(anchors, first)
        assert model.label_anchors(anchors, list(first))[0] is labels
        assert model.label_anchors(anchors, second)[0] is not labels
        assert model.label_anchors(anchors[:1], first)[0][0].shape == (6,)
        assert model._ema_update("loss_normalizer", 50, 100) == pytest.approx(95)
        assert model._ema_update("loss_normalizer", 50, 100) == pytest.approx(95)
        assert model._ema_update("other", 50, 0) == pytest.approx(5)
    assert model.label_anchors(anchors, first)[0] is not labels
    assert not {"label_anchors", "_ema_update"} & set(vars(model))


def test_what_a_caller_put_on_the_instance_comes_back() -> None:
    model = build_model(detector_cfg("RetinaNet", HIGH))
    calls: list[Any] = []
    model.label_anchors = own = lambda *args: calls.append(args) or len(calls)
    with heads_of(model).same_targets():
        assert [model.label_anchors([], []) for _ in range(2)] == [1, 1]
    assert model.label_anchors is own and len(calls) == 1
