"""
What a full pass of a model over a blank image shows of it.

Which captures fire, how often and in what order (so that the teacher can stop early), and each
level's real stride and channels (so that pyramids are paired and adapters sized).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kd_det.distillation.capture import CapturePath, Captures, FeatureCapture
from kd_det.distillation.pairing import Level, levels_of, measure_levels
from kd_det.distillers.predictions import DensePredictions, HeadOutputs

# Least side of the blank image, small and a multiple of detectors' padding divisors. A model with
# another one (a ViT of patches of 14 pixels) gets the next multiple, or its strides come out wrong.
_SIDE = 256


@dataclass(frozen=True)
class Probe:
    """
    One model's captures of a blank image.

    Attributes:
        captures: what fired, in order.
        view_factor: pixels of the loaded image per pixel of the model's input.
        device: where the model lives.
        side: of the image, in pixels.
    """

    captures: Captures
    view_factor: float
    device: torch.device
    side: int

    def levels(self, path: CapturePath) -> list[Level]:
        """Return the levels of a captured pyramid, strides in the loaded image's pixels."""
        # Detectron2's inference goes on to work on a head's outputs in place.
        maps = levels_of(self.captures.get(path, changed=True), path)
        return measure_levels(maps, self.side, self.view_factor)

    def predictions(
        self, path: CapturePath, decode: Callable[[HeadOutputs], DensePredictions]
    ) -> DensePredictions:
        """Return what a captured dense head predicts; of its numbers only the shapes count."""
        return decode(self.captures.get(path, changed=True)[0])


@torch.no_grad()
def probe(model: nn.Module, capture: FeatureCapture, view_factor: float, *, role: str) -> Probe:
    """
    Run the whole model on a blank image in evaluation mode; buffers and modes stay.

    Args:
        model: student or teacher.
        capture: what to keep.
        view_factor: pixels of the loaded image per pixel of the model's input.
        role: "student" or "teacher", for messages.

    Raises:
        ValueError: the model cannot run on an image alone.
        RuntimeError: a module that is to be captured does not run.
    """
    # Detectron2 builds None for PrecomputedProposals.
    if getattr(model, "proposal_generator", model) is None:
        raise ValueError(
            f"The {role} ({type(model).__name__}) takes precomputed proposals with every image "
            "(MODEL.PROPOSAL_GENERATOR.NAME 'PrecomputedProposals'), which teacher and student "
            "cannot share; take a model that makes its own: MODEL.PROPOSAL_GENERATOR.NAME 'RPN' "
            "and MODEL.LOAD_PROPOSALS False."
        )
    device = next(model.parameters()).device
    channels = next((len(b) for n, b in model.named_buffers() if n.endswith("pixel_mean")), 3)
    divisor = max(1, getattr(model, "size_divisibility", 1))
    # A ViTDet pads every image to one square, whatever its size.
    constraints = getattr(getattr(model, "backbone", None), "padding_constraints", {})
    side = max(math.ceil(_SIDE / divisor) * divisor, constraints.get("square_size", 0))
    image = torch.zeros(channels, side, side, device=device)
    with _evaluating(model), capture.record() as captures:
        model([{"image": image}])
    capture.count_needed(captures.order)
    return Probe(captures, view_factor, device, side)


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
