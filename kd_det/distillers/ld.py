"""
LD: where the sides of a box may lie, on positives and on what is nearly one.

Paper: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022
(arXiv 2102.12252). The sides of a box are distributions over bins (GFL); with Main the positives of
ATSS and VLR the ring of anchors around each box that just miss its threshold:

    L = LD_WEIGHT * KL of the sides on Main + VLR_WEIGHT * KL of the sides on VLR
      + KD_WEIGHT * KL of the classes on Main

(`functional.ld` has the terms and their normalisers.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, CaptureSpec, Distiller, Step
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.distillers.predictions import PredictionPair
from kd_det.functional.ld import (
    MAIN_FACTOR,
    VLR_FACTOR,
    Regions,
    class_loss,
    find_regions,
    localization_loss,
)
from kd_det.functional.level_grid import to_device
from kd_det.functional.scores import confidence

KDScope = Literal["level", "all"]


@DISTILLER_REGISTRY.register()
class LD(Distiller):
    """Sides of boxes ("main", "vlr") and classes ("kd") of two detectors like GFL."""

    config_key = "LD"
    share = share_of_trained = 1.0
    needs_boxes = True

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.LD; values are the release's for GFL, its WEIGHT 1."""
        super().add_config(node)
        # Module path, in both models, of the dense head.
        node.HEAD = "head"
        # Weights of the sides on positives, of the sides on the ring, and of the classes. With
        # KD_WEIGHT 0 both models may have different classes.
        node.LD_WEIGHT = 0.25
        node.VLR_WEIGHT = 0.25
        node.KD_WEIGHT = 10.0
        # Temperatures of sides and of classes.
        node.TAU = 10.0
        node.KD_TAU = 2.0
        # The ring begins at this fraction of a box's threshold; 1 makes it empty.
        node.GAMMA = 0.25
        # Candidates of a box per level, as MODEL.GFL.TOPK.
        node.TOPK = 9
        # The classes' mean is over the positives of each "level" (release) or of "all" together.
        node.KD_SCOPE = "level"
        # Leave positions on the padding of a batch out.
        node.MASK_PADDING = True

    def __init__(
        self,
        *,
        head: str = "head",
        ld_weight: float = 0.25,
        vlr_weight: float = 0.25,
        kd_weight: float = 10.0,
        tau: float = 10.0,
        kd_tau: float = 2.0,
        gamma: float = 0.25,
        topk: int = 9,
        kd_scope: KDScope = "level",
        mask_padding: bool = True,
    ) -> None:
        """
        Args: as the keys of KD.LD.

        Raises:
            ValueError: a value out of its range; the message names the key.
        """
        super().__init__()
        weights = {"LD_WEIGHT": ld_weight, "VLR_WEIGHT": vlr_weight, "KD_WEIGHT": kd_weight}
        for key, value in weights.items():
            expect_number(f"KD.LD.{key}", value)
        expect_number("KD.LD.TAU", tau, low=1e-6)
        expect_number("KD.LD.KD_TAU", kd_tau, low=1e-6)
        expect_number("KD.LD.GAMMA", gamma, high=1.0)
        expect_number("KD.LD.TOPK", topk, low=1)
        expect_choice("KD.LD.KD_SCOPE", kd_scope, KDScope)
        self.spec = CaptureSpec("predictions", head, head, "predictions", bins=True)
        self.uses_class_scores = kd_weight > 0
        self.ld_weight = ld_weight
        self.vlr_weight = vlr_weight
        self.kd_weight = kd_weight
        self.tau = tau
        self.kd_tau = kd_tau
        self.gamma = gamma
        self.topk = topk
        self.kd_scope = kd_scope
        self.mask_padding = mask_padding

    def captures(self) -> Sequence[CaptureSpec]:
        """Return the predictions of both."""
        return [self.spec]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the losses "main", "vlr" and, with KD_WEIGHT, "kd"."""
        pairs = step.predictions[self.spec.name]
        regions = self.regions(pairs, step.targets.boxes)
        main: list[Tensor] = []
        vlr: list[Tensor] = []
        for pair, (positive, ring) in zip(pairs, regions, strict=True):
            bins = pair.student.distributions, pair.teacher.distributions
            assert bins[0] is not None and bins[1] is not None  # checked when the model was built
            for losses, weight, factor in (
                (main, positive * confidence(pair.student.logits), MAIN_FACTOR),
                (vlr, ring, VLR_FACTOR),
            ):
                losses.append(
                    localization_loss(
                        bins[0],
                        bins[1],
                        weight,
                        factor=factor,
                        num_images=len(weight),
                        tau=self.tau,
                    )
                )
        out = {
            "main": torch.stack(main).sum() * self.ld_weight,
            "vlr": torch.stack(vlr).sum() * self.vlr_weight,
        }
        if self.kd_weight > 0:
            out["kd"] = self._classes(pairs, [x.main for x in regions]) * self.kd_weight
        return out

    @torch.no_grad()
    def regions(self, pairs: Sequence[PredictionPair], boxes: Sequence[Tensor]) -> list[Regions]:
        """
        Find where each level is distilled.

        Args:
            pairs: the predictions.
            boxes: ground truth per image, (M, 4), on the CPU.

        Returns:
            Per level, both regions as (N, R) weights, 0 on padding where that is masked.
        """
        device = pairs[0].student.logits.device
        anchors = [pair.anchor_boxes() for pair in pairs]
        found = [
            find_regions(anchors, to_device(x, device), topk=self.topk, gamma=self.gamma)
            for x in boxes
        ]
        counts = [len(level) for level in anchors]
        main = torch.stack([x.main for x in found]).float().split(counts, dim=1)
        vlr = torch.stack([x.vlr for x in found]).split(counts, dim=1)
        out = []
        for pair, *region in zip(pairs, main, vlr, strict=True):
            valid = pair.valid() if self.mask_padding else 1.0
            out.append(Regions(region[0] * valid, region[1] * valid))
        return out

    def _classes(self, pairs: Sequence[PredictionPair], main: Sequence[Tensor]) -> Tensor:
        own, other = [x.student.logits for x in pairs], [x.teacher.logits for x in pairs]
        if self.kd_scope == "all":
            with torch.autocast(own[0].device.type, enabled=False):
                whole = [torch.cat(list(x), dim=1) for x in (own, other, main)]
            return class_loss(*whole, tau=self.kd_tau)
        levels = zip(own, other, main, strict=True)
        return torch.stack([class_loss(*level, tau=self.kd_tau) for level in levels]).sum()
