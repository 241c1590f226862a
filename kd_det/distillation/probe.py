"""
What a full pass of a model over a blank image shows of it.

Which captures fire, how often and in what order (so that the teacher can stop early), and each
level's real stride and channels (so that pyramids are paired and adapters sized).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kd_det.distillation.capture import CapturePath, Captures, FeatureCapture
from kd_det.distillation.pairing import Level, levels_of, measure_levels

# Side of the blank image: a multiple of every padding divisor in use, and small.
_SIDE = 256


@dataclass(frozen=True)
class Probe:
    """
    One model's captures of a blank image.

    Attributes:
        captures: what fired, in order.
        view_factor: pixels of the loaded image per pixel of the model's input.
        device: where the model lives.
    """

    captures: Captures
    view_factor: float
    device: torch.device

    def levels(self, path: CapturePath) -> list[Level]:
        """Return the levels of a captured pyramid, strides in the loaded image's pixels."""
        return measure_levels(levels_of(self.captures.get(path), path), _SIDE, self.view_factor)


@torch.no_grad()
def probe(model: nn.Module, capture: FeatureCapture, view_factor: float) -> Probe:
    """
    Run the whole model on a blank image in evaluation mode; buffers and modes stay.

    Raises:
        RuntimeError: a module that is to be captured does not run.
    """
    device = next(model.parameters()).device
    channels = next((len(b) for n, b in model.named_buffers() if n.endswith("pixel_mean")), 3)
    image = torch.zeros(channels, _SIDE, _SIDE, device=device)
    with _evaluating(model), capture.record() as captures:
        model([{"image": image}])
    capture.count_needed(captures.order)
    return Probe(captures, view_factor, device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and give every module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
