"""Decoders: found by class, open to new detectors; predictions in another image's pixels."""

from typing import Any

import pytest
import torch
from torch import nn

import kd_det.modeling  # noqa: F401
from kd_det.distillers.predictions import (
    Decoder,
    DensePredictions,
    decode_dense,
    decoder_of,
    register_decoder,
)


class Parent(nn.Module):
    pass


class Child(Parent):
    pass


def decoding(stride: float) -> Decoder:
    def decode(model: nn.Module, outputs: Any) -> DensePredictions:
        return DensePredictions(list(outputs[0]), [], [stride], [], 0.5)

    return decode


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_det.distillers import predictions

    monkeypatch.setattr(predictions, "_DECODERS", dict(predictions._DECODERS))


def test_a_new_detector_is_one_function_that_serves_its_subclasses() -> None:
    with pytest.raises(
        TypeError,
        match=r"dense predictions of Child; known are .*FCOS, GFL, RetinaNet, SinglePrediction",
    ):
        decoder_of(Child())
    register_decoder(Parent)(decoding(4.0))
    assert decoder_of(Child())([[]]).strides == [4.0]
    register_decoder(Child)(decoding(2.0))
    assert decode_dense(Child(), [[]]).strides == [2.0]
    assert decode_dense(Parent(), [[]]).strides == [4.0]


def test_a_decoder_gets_the_model_and_the_outputs() -> None:
    seen = []

    @register_decoder(Parent)
    def decode(model: nn.Module, outputs: Any) -> DensePredictions:
        seen.append(model)
        return DensePredictions(list(outputs[0]), [], [], [], 0.5)

    model, logits = Child(), torch.zeros(1)
    assert decoder_of(model)([[logits]]).logits[0] is logits
    assert seen == [model]


def test_a_second_decoder_is_refused() -> None:
    register_decoder(Parent)(decoding(4.0))
    with pytest.raises(ValueError, match="Parent has a decoder already"):
        register_decoder(Parent)(decoding(2.0))


def test_scaling_changes_boxes_and_strides_alone() -> None:
    logits, boxes = torch.randn(1, 2, 3), torch.tensor([[[-1.0, 2, 3, 4], [0, 0, 8, 6]]])
    small = DensePredictions([logits], [boxes], [8.0], [(1, 2)], 0.5)
    assert small.scaled(1) is small
    large = small.scaled(2)
    assert large.boxes[0].tolist() == [[[-2.0, 4, 6, 8], [0, 0, 16, 12]]]
    assert large.strides == [16.0]
    assert large.logits[0] is logits and large.sizes == [(1, 2)] and large.offset == 0.5
