"""One entry of KD.DISTILLERS at work: the distiller, its weight, captures, pairs and adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kd_det.distillation.batch import Frame
from kd_det.distillation.capture import CapturePath, Captures
from kd_det.distillation.pairing import LevelPair, levels_of
from kd_det.distillers import CaptureSpec, Distiller, Pair, Step, Targets
from kd_det.distillers.predictions import DensePredictions, HeadOutputs

LossDict = dict[str, Tensor]
# Iteration -> weight.
WeightSchedule = Callable[[int], float]


@dataclass(frozen=True)
class ResolvedCapture:
    """
    One capture of one distiller, with the modules that its paths name.

    Attributes:
        spec: as the distiller wants it.
        student, teacher: where it is captured.
        pairs: of a pyramid, the levels on common grids, from fine to coarse.
    """

    spec: CaptureSpec
    student: CapturePath | None
    teacher: CapturePath | None
    pairs: tuple[LevelPair, ...] = ()


class ActiveDistiller(nn.Module):
    """
    A distiller with all that belongs to it.

    Args:
        name: its entry of KD.DISTILLERS.
        distiller: the technique.
        schedule: its weight at every iteration.
        captures: resolved, pyramids paired.
        adapters: per pyramid capture, one module per pair.
        decode: turns the teacher's raw head outputs into `DensePredictions` in the loaded image's
            pixels; None where no capture wants predictions.
    """

    def __init__(
        self,
        *,
        name: str,
        distiller: Distiller,
        schedule: WeightSchedule,
        captures: list[ResolvedCapture],
        adapters: Mapping[str, nn.ModuleList],
        decode: Callable[[HeadOutputs], DensePredictions] | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.distiller = distiller
        self.schedule = schedule
        self.captures = captures
        self.adapters = nn.ModuleDict(adapters)
        self._decode = decode

    @property
    def slug(self) -> str:
        """Its name in loss keys and logged scalars: "ssim", or "ssim:head" for "SSIM:head"."""
        return slug_of(self.name, self.distiller)

    def step(self, student: Captures, teacher: Captures, targets: Targets, frame: Frame) -> Step:
        """
        Sort the captures of both models' passes over one batch into what the distiller sees.

        Args:
            student, teacher: what was captured.
            targets: the batch's ground truth.
            frame: the batch's geometry, common to all distillers.
        """
        pairs: dict[str, list[Pair]] = {}
        predictions: dict[str, DensePredictions] = {}
        features: list[Tensor] = []
        for item in self.captures:
            assert item.teacher is not None
            outputs = teacher.get(item.teacher)
            if item.spec.kind == "predictions":
                assert self._decode is not None
                predictions[item.spec.name] = self._decode(outputs[0])
                continue
            assert item.student is not None
            own = levels_of(student.get(item.student), item.student)
            other = levels_of(outputs, item.teacher)
            pairs[item.spec.name] = [
                frame.pair(pair, own[pair.student][1], other[pair.teacher][1], adapter)
                for pair, adapter in zip(
                    item.pairs, cast(nn.ModuleList, self.adapters[item.spec.name]), strict=True
                )
            ]
            features += [own[pair.student][1] for pair in item.pairs]
        return Step(pairs, predictions, targets, features)

    def losses(self, step: Step, weight: float) -> LossDict:
        """Return the weighted losses of one step under their keys."""
        return {
            loss_key(self.slug, part): value * weight
            for part, value in self.distiller(step).items()
        }

    def idle(self) -> LossDict:
        """
        Return a zero loss that touches the parameters of a distiller that rests; none, if none.

        A parameter without gradient would stall DDP's reduction. All processes rest at the same
        iterations, so their loss keys stay the same.
        """
        modules = (self.distiller, self.adapters)
        parameters = [p.sum() for module in modules for p in module.parameters()]
        if not parameters:
            return {}
        return {loss_key(self.slug, "idle"): torch.stack(parameters).sum() * 0}


def slug_of(name: str, distiller: Distiller) -> str:
    """Return the name of an entry of KD.DISTILLERS in loss keys and logged scalars."""
    _, colon, label = name.partition(":")
    return f"{distiller.config_key.lower()}{colon}{label}"


def loss_key(slug: str, part: str) -> str:
    """Return the key of a loss in the model's loss dict: `loss_kd_<distiller>[_<part>]`."""
    return f"loss_kd_{slug}_{part}" if part else f"loss_kd_{slug}"
