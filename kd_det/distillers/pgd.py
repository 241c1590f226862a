"""
PGD: distil where the teacher predicts well.

Paper: Yang, Ochal, Storkey, Crowley, "Prediction-Guided Distillation for Dense Object Detection",
ECCV 2022 (arXiv 2203.05469).

    importance  I: of each box, a Gaussian fitted to the K positions at which the teacher's class
                score and IoU are best (`functional.gaussian_importance`), once with xi = 0.8 for
                classification and once with 0.6 for regression
    L = sum over levels  w_l (alpha L_fg + beta L_bg) + delta L_att    first block, cls tower
                       + gamma L_fea + delta L_att                     first block, reg tower

(`functional.pgd` has the terms.) Beyond the paper: adapters where widths differ, and
FEATURES "neck", which applies the classification part to the pyramid itself, so that a dense
teacher guides a student whose head has no towers. To compare with, FOREGROUND "box" and "center"
put masks of the boxes alone, 0 or 1, in place of I.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_det.distillers.base import (
    DISTILLER_REGISTRY,
    AdapterMode,
    CaptureSpec,
    Distiller,
    LevelShape,
    Pair,
    Step,
    Targets,
    TeacherModule,
)
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.distillers.pgd_masks import Masks, nearest_level, on_grid, pad_boxes
from kd_det.distillers.predictions import DensePredictions
from kd_det.functional.gaussian_importance import Gate, ImportanceOptions, importance_maps
from kd_det.functional.level_grid import (
    Grid,
    positions_in_boxes,
    positions_in_images,
    split_levels,
    to_device,
)
from kd_det.functional.pgd import MaskScope, classification_terms, count_selected, regression_terms
from kd_det.functional.reduce import mean_over_processes

# What is compared: the towers of both heads, or the pyramids.
Features = Literal["towers", "neck"]
# Where the importance is from: the teacher's predictions, all of a box, or its centre.
Foreground = Literal["prediction", "box", "center"]
# Of a box's centre, in strides of each level: FCOS's centre sampling.
_CENTER_RADIUS = 1.5


@DISTILLER_REGISTRY.register()
class PGD(Distiller):
    """Prediction-guided classification and regression distillation with attention."""

    config_key = "PGD"
    uses_class_scores = True
    needs_boxes = True
    # Towers close to the losses, where the teacher is right.
    share = 1.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.PGD. Values are those of FCOS R101 -> R50 where detectors differ."""
        super().add_config(node)
        # "towers": the head's towers, as published; "neck": the pyramid itself, for students whose
        # head has no towers (R-CNN students of a dense teacher; not in the paper), classification
        # part alone.
        node.FEATURES = "towers"
        # Module paths of the towers in both models; an empty REG_TOWER (coupled heads) leaves the
        # classification part alone.
        node.CLS_TOWER = "head.cls_subnet"
        node.REG_TOWER = "head.bbox_subnet"
        # Block of the towers whose activation is compared; 0 is the first.
        node.TOWER_BLOCK = 0
        # Adapter where the towers' widths differ ("auto"); the paper has none.
        node.ADAPTER = "auto"
        # Weights of classification foreground, background, regression, attention. The release
        # weights a batch's images by each other's masks: with right masks ALPHA and BETA may need
        # to be 2 to 4 times larger.
        node.ALPHA = 0.04
        node.BETA = 0.02
        node.GAMMA = 0.064
        node.DELTA = 0.0008
        # Factors of ALPHA and BETA per level, from fine to coarse.
        node.LEVEL_WEIGHTS = [1.0, 1.25, 1.5, 1.75, 2.0]
        # Temperature of both attentions (AutoAssign: 0.4).
        node.TAU = 0.8
        # Where the foreground is: "prediction", as published, by TOP_K, XI_CLS, XI_REG, GATE; or,
        # to compare with and without these four, all positions inside a box alike ("box"), or those
        # less than 1.5 strides from its centre ("center").
        node.FOREGROUND = "prediction"
        # Positions selected for each box (ATSS: 9).
        node.TOP_K = 30
        # Exponent of the IoU in the quality score, for the two masks; 1 - it is the class score's.
        node.XI_CLS = 0.8
        node.XI_REG = 0.6
        # The box gates positions "before" the top-k (paper) or "after" the fit (release).
        node.GATE = "before"
        # Padding takes part in nothing (the release's anchor-based heads); False counts it as
        # background.
        node.MASK_PADDING = True
        # Regions annotated as crowd or ignored are no background (the release counts them as such).
        node.MASK_IGNORED = False
        # Masks of each "image", or summed over the "batch" (the release, whose results may rest on
        # it).
        node.MASK_SCOPE = "image"
        # The student's ground truth is assigned by the teacher's predictions (the release, for
        # DDOD); of students whose assignment reads predictions.
        node.ASSIGN_FROM_TEACHER = False

    def __init__(
        self,
        *,
        features: Features = "towers",
        cls_tower: str = "head.cls_subnet",
        reg_tower: str = "head.bbox_subnet",
        tower_block: int = 0,
        adapter: AdapterMode = "auto",
        alpha: float = 0.04,
        beta: float = 0.02,
        gamma: float = 0.064,
        delta: float = 0.0008,
        level_weights: Sequence[float] = (1.0, 1.25, 1.5, 1.75, 2.0),
        tau: float = 0.8,
        foreground: Foreground = "prediction",
        top_k: int = 30,
        xi_cls: float = 0.8,
        xi_reg: float = 0.6,
        gate: Gate = "before",
        mask_padding: bool = True,
        mask_ignored: bool = False,
        mask_scope: MaskScope = "image",
        assign_from_teacher: bool = False,
    ) -> None:
        """
        Args: as the keys of KD.PGD, which say what each is and where its value is from.

        Raises:
            ValueError: a value out of its range; the message names the key.
        """
        super().__init__()
        expect_choice("KD.PGD.FEATURES", features, Features)
        expect_choice("KD.PGD.FOREGROUND", foreground, Foreground)
        expect_choice("KD.PGD.GATE", gate, Gate)
        expect_choice("KD.PGD.MASK_SCOPE", mask_scope, MaskScope)
        for key, weight in (("ALPHA", alpha), ("BETA", beta), ("GAMMA", gamma), ("DELTA", delta)):
            expect_number(f"KD.PGD.{key}", weight)
        for i, weight in enumerate(level_weights):
            expect_number(f"KD.PGD.LEVEL_WEIGHTS[{i}]", weight)
        expect_number("KD.PGD.TAU", tau, low=1e-6)
        expect_number("KD.PGD.TOP_K", top_k, low=1)
        expect_number("KD.PGD.TOWER_BLOCK", tower_block)
        expect_number("KD.PGD.XI_CLS", xi_cls, high=1)
        expect_number("KD.PGD.XI_REG", xi_reg, high=1)
        neck = features == "neck"
        self.cls_path = "backbone" if neck else f"{cls_tower}#{tower_block}"
        self.reg_path = "" if neck or not reg_tower else f"{reg_tower}#{tower_block}"
        self.adapter = adapter
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.delta = delta
        self.level_weights = tuple(level_weights)
        self.tau = tau
        self.foreground = foreground
        self.top_k = top_k
        self.exponents = (xi_cls, xi_reg)
        self.gate = gate
        self.mask_padding = mask_padding
        self.mask_ignored = mask_ignored
        self.mask_scope = mask_scope
        self.guide = "predictions" if assign_from_teacher else None

    def captures(self) -> Sequence[CaptureSpec]:
        """Return the towers of both models and the teacher's predictions."""
        specs = [CaptureSpec("cls", self.cls_path, self.cls_path)]
        if self.reg_path:
            specs.append(CaptureSpec("reg", self.reg_path, self.reg_path))
        return [*specs, CaptureSpec("predictions", None, "head", "predictions")]

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """Check that every level has a weight, and the teacher's predictions at its stride."""
        self._expect_weights(len(levels["cls"]))
        strides = [level.stride for level in levels["predictions"]]
        for part in levels.keys() - {"predictions"}:
            for level in levels[part]:
                nearest_level(level.name, level.stride, strides)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the losses "cls" and, with a regression tower, "reg", summed over levels."""
        predictions = step.teacher["predictions"]
        masks = self.masks(predictions, step.targets)
        strides = predictions.strides
        losses = {"cls": self._classification(step.pairs["cls"], masks, strides)}
        if self.reg_path:
            losses["reg"] = self._regression(step.pairs["reg"], masks, strides)
        return losses

    @torch.no_grad()
    def masks(self, predictions: DensePredictions, targets: Targets) -> Masks:
        """
        Compute importance and background of every position.

        Args:
            predictions: the teacher's `DensePredictions`.
            targets: the ground truth.
        """
        device = predictions.logits[0].device
        grids = [
            Grid(height, width, stride, predictions.offset)
            for (height, width), stride in zip(predictions.sizes, predictions.strides, strict=True)
        ]
        boxes, present = pad_boxes(targets.boxes)
        classes = pad_sequence(targets.classes, batch_first=True).reshape(present.shape)
        on_image = positions_in_images(grids, targets.image_sizes, device)
        valid = on_image if self.mask_padding else torch.ones_like(on_image)
        inside = to_device(positions_in_boxes(grids, boxes, present), device)
        if self.foreground == "prediction":
            cls, reg = importance_maps(
                torch.cat(predictions.logits, 1),
                torch.cat(predictions.boxes, 1),
                boxes,
                classes,
                present,
                grids,
                ImportanceOptions(exponents=self.exponents, top_k=self.top_k, gate=self.gate),
                position_valid=valid,
            )
        else:
            near = inside
            if self.foreground == "center":
                near = to_device(positions_in_boxes(grids, boxes, present, _CENTER_RADIUS), device)
            cls = reg = (near & valid).float()
        background = ~inside
        if self.mask_ignored:
            if len(targets.ignored) != len(targets.boxes):
                raise ValueError(
                    "KD.PGD.MASK_IGNORED is True, but the data loader does not say which regions "
                    'are ignored ("ignored_boxes"); let it map by kd_det.data.CheckedDatasetMapper.'
                )
            ignored, some = pad_boxes(targets.ignored)
            background &= ~to_device(positions_in_boxes(grids, ignored, some), device)
        return Masks(*(split_levels(x, grids) for x in (cls, reg, background, valid)))

    def _expect_weights(self, levels: int) -> None:
        if levels > len(self.level_weights):
            raise ValueError(
                f"KD.PGD.LEVEL_WEIGHTS has {len(self.level_weights)} entries, but {levels} "
                "levels are paired; give one per level."
            )

    def _classification(self, pairs: list[Pair], masks: Masks, strides: list[float]) -> Tensor:
        self._expect_weights(len(pairs))
        losses = []
        for pair, level_weight in zip(pairs, self.level_weights, strict=False):
            terms = classification_terms(
                pair.student,
                pair.teacher,
                on_grid(masks.cls, pair, strides),
                on_grid(masks.background, pair, strides),
                tau=self.tau,
                valid=on_grid(masks.valid, pair, strides),
                mask_scope=self.mask_scope,
            )
            losses.append(terms.weighted(self.alpha, self.beta, self.delta, level_weight))
        return torch.stack(losses).sum()

    def _regression(self, pairs: list[Pair], masks: Masks, strides: list[float]) -> Tensor:
        importances = [on_grid(masks.reg, pair, strides) for pair in pairs]
        # Of all processes, each object weighs the same: one exchange for all levels.
        counts = mean_over_processes(torch.stack([count_selected(x) for x in importances]))
        terms = (
            regression_terms(pair.student, pair.teacher, importance, tau=self.tau, count=count)
            for pair, importance, count in zip(pairs, importances, counts, strict=True)
        )
        return torch.stack([term.weighted(self.gamma, self.delta) for term in terms]).sum()
