"""
CrossKD: the student's head features in the rest of the teacher's head.

Paper: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024
(arXiv 2306.11369). The student's features after REUSE_FROM convolutions of a tower take the
teacher's statistics there and run through the frozen rest of the teacher's head; the cross-head
prediction imitates the teacher's own:

    L = CLS_WEIGHT / N+ * sum |sigmoid(z^) - sigmoid(z^T)|^beta CE(z^, sigmoid(z^T))
      + REG_WEIGHT * (boxes: 1 / N+ * sum w (1 - GIoU)  or  bins: sum w KL / sum w)
      + QUALITY_WEIGHT / N+ * sum over the positives of ATSS  CE(q^, sigmoid(q^T))

w is the teacher's highest class probability (`functional.crosskd`). Both predictions are the
teacher's, so the student may have other classes, anchors or another assignment; with REUSE_FROM 0
it only needs a pyramid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_det.distillers.base import (
    DISTILLER_REGISTRY,
    AdapterMode,
    CaptureSpec,
    Distiller,
    Pair,
    Step,
)
from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.checks import expect_choice, expect_number
from kd_det.distillers.crosskd_head import QUALITY, TOWERS, cross_predict, level_of
from kd_det.distillers.predictions import DensePredictions, PredictionPair
from kd_det.functional.atss import atss_assign
from kd_det.functional.bckd import classification_loss
from kd_det.functional.crosskd import BoxDistance, bin_loss, box_loss, quality_loss
from kd_det.functional.level_grid import Grid, same_stride, to_device
from kd_det.functional.moments import Scope
from kd_det.functional.scores import confidence

# Whose predictions follow from what enters their towers.
_SERVED = "RetinaNet, FCOS, ATSS, GFL, AutoAssign, DDOD or FSAF"


@DISTILLER_REGISTRY.register()
class CrossKD(Distiller):
    """Class scores ("cls") and boxes ("reg") that the teacher's head reads from the student."""

    config_key = "CROSSKD"
    share = share_of_trained = 1.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.CROSSKD; values are the release's for GFL, its WEIGHT 1."""
        super().add_config(node)
        # Module path, in both models, of the dense head.
        node.HEAD = "head"
        # Convolutions of its own towers that the student's features pass before they enter the
        # teacher's: GFL, RetinaNet, ATSS 3 of 4, FCOS 2 of 4. 0: its pyramid enters directly.
        node.REUSE_FROM = 3
        # Module paths of the pyramids, for REUSE_FROM 0.
        node.STUDENT_CAPTURE = "backbone"
        node.TEACHER_CAPTURE = "backbone"
        # 1x1 convolution where widths differ: "auto", "always" or "never".
        node.ADAPTER = "auto"
        # Weights of class scores (FCOS: .4) and of boxes (GFL's bins: 4; GIoU: 1; FCOS: .75).
        node.CLS_WEIGHT = 1.0
        node.REG_WEIGHT = 4.0
        # Weight of the boxes' quality at the positives of ATSS, for such a teacher (release: 1).
        node.QUALITY_WEIGHT = 0.0
        # Exponent of the difference of probabilities.
        node.BETA = 1.0
        # Boxes that are no distributions: "giou", or "log_iou" for -log IoU (FCOS).
        node.BOX = "giou"
        # Statistics are those of a process's "batch" (release) or of each "image".
        node.SCOPE = "batch"
        # Leave positions on the padding of a batch out.
        node.MASK_PADDING = True

    def __init__(
        self,
        *,
        head: str = "head",
        reuse_from: int = 3,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
        cls_weight: float = 1.0,
        reg_weight: float = 4.0,
        quality_weight: float = 0.0,
        beta: float = 1.0,
        box: BoxDistance = "giou",
        scope: Scope = "batch",
        mask_padding: bool = True,
    ) -> None:
        """
        Args: as the keys of KD.CROSSKD.

        Raises:
            ValueError: a value out of its range; the message names the key.
        """
        super().__init__()
        expect_number("KD.CROSSKD.REUSE_FROM", reuse_from)
        expect_number("KD.CROSSKD.CLS_WEIGHT", cls_weight)
        expect_number("KD.CROSSKD.REG_WEIGHT", reg_weight)
        expect_number("KD.CROSSKD.QUALITY_WEIGHT", quality_weight)
        expect_number("KD.CROSSKD.BETA", beta)
        expect_choice("KD.CROSSKD.BOX", box, BoxDistance)
        expect_choice("KD.CROSSKD.SCOPE", scope, Scope)
        self.head = head
        self.reuse_from = reuse_from
        self.pyramids = student_capture, teacher_capture
        self.adapter = adapter
        self.cls_weight = cls_weight
        self.reg_weight = reg_weight
        self.quality_weight = quality_weight
        self.needs_boxes = quality_weight > 0
        self._topk = 9  # until `build` has seen the teacher
        self.beta = beta
        self.box: BoxDistance = box
        self.scope: Scope = scope
        self.mask_padding = mask_padding

    def captures(self) -> Sequence[CaptureSpec]:
        """Return where features enter, the teacher's predictions, and the teacher itself."""
        if self.reuse_from == 0:
            entries = [CaptureSpec("features", *self.pyramids)]
        else:
            paths = {
                part: f"{self.head}.{tower}^{self.reuse_from - 1}"
                for part, (tower, _) in TOWERS.items()
            }
            advice = (
                f"KD.CROSSKD.REUSE_FROM is {self.reuse_from}: so many convolutions must stand in "
                f"each tower of both models' {self.head}. Take fewer, or 0, which lets the "
                "student's pyramid enter the teacher's head."
            )
            entries = [CaptureSpec(part, path, path, advice=advice) for part, path in paths.items()]
        return [
            *entries,
            CaptureSpec("predictions", None, self.head, "predictions"),
            CaptureSpec("teacher", None, "", "module"),
        ]

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """Check that the teacher predicts from towers, and reads every level that is compared."""
        model = modules["teacher"].module
        head = model.get_submodule(self.head)
        missing = [
            name
            for names in TOWERS.values()
            for name in names
            if not isinstance(getattr(head, name, None), nn.Module)
        ]
        if missing or not hasattr(model, "anchor_generator"):
            raise ValueError(
                f"KD.CROSSKD: the teacher's {self.head} ({type(head).__name__}) has no "
                f"{', '.join(missing) or 'anchors'}; take a teacher with the head of "
                f"{_SERVED}."
            )
        # A head says so where more than a tower and a convolution makes its predictions.
        if not getattr(head, "predicts_from_towers", True):
            raise ValueError(
                f"KD.CROSSKD: the predictions of the teacher's {self.head} ({type(head).__name__}) "
                "do not follow from what its towers give at each position; take a teacher with the "
                f"head of {_SERVED}."
            )
        if self.quality_weight > 0:
            if not isinstance(getattr(head, QUALITY, None), nn.Module):
                raise ValueError(
                    f"KD.CROSSKD.QUALITY_WEIGHT is {self.quality_weight:g}, but the teacher's "
                    f"{self.head} ({type(head).__name__}) does not say how good its boxes are; set "
                    "it to 0, or take an ATSS teacher."
                )
            self._topk = int(getattr(getattr(model, "options", None), "topk", self._topk))
        factor = modules["teacher"].view_factor
        generator: Any = model.anchor_generator
        read = [float(stride) * factor for stride in generator.strides]
        for level in (level for levels_ in levels.values() for level in levels_):
            if not any(same_stride(level.stride, stride) for stride in read):
                raise ValueError(
                    f"KD.CROSSKD: the levels {level.name} have stride {level.stride:g}, but the "
                    f"teacher's head reads strides {', '.join(f'{s:g}' for s in read)} only; set "
                    "REUSE_FROM to 1 or more, or the captures to pyramids of those levels."
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the losses "cls" and "reg"."""
        own = step.teacher["predictions"]
        entries = {part: step.pairs[part if self.reuse_from else "features"] for part in TOWERS}
        cross = cross_predict(
            step.modules["teacher"],
            entries,
            own,
            head=self.head,
            reuse_from=self.reuse_from,
            scope=self.scope,
            quality=self.quality_weight > 0,
        )
        pairs = [_compare(entry, cross, own) for entry in entries["cls"]]
        weights = [confidence(x.teacher.logits) for x in pairs]
        normalizer = step.normalizer(lambda: _total(weights, [x.valid() for x in pairs]))
        valid = [x.valid() if self.mask_padding else None for x in pairs]
        classes = [
            classification_loss(
                x.student.logits, x.teacher.logits, normalizer=normalizer, beta=self.beta, valid=v
            )
            for x, v in zip(pairs, valid, strict=True)
        ]
        weights = [w if v is None else w * v for w, v in zip(weights, valid, strict=True)]
        boxes = self._boxes(pairs, weights, step, normalizer)
        out = {
            "cls": torch.stack(classes).sum() * self.cls_weight,
            "reg": torch.stack(boxes).sum() * self.reg_weight,
        }
        if self.quality_weight > 0:
            out["quality"] = self._quality(pairs, step, normalizer) * self.quality_weight
        return out

    def _quality(
        self, pairs: list[PredictionPair], step: Step, normalizer: float | Tensor
    ) -> Tensor:
        """Compare how good the boxes are said to be, at the positives of the teacher's anchors."""
        anchors = [x.anchor_boxes() for x in pairs]
        positive = torch.stack(
            [
                atss_assign(anchors, to_device(boxes, anchors[0].device), self._topk) >= 0
                for boxes in step.targets.boxes
            ]
        ).float()
        losses = []
        for x, weight in zip(pairs, positive.split([len(a) for a in anchors], 1), strict=True):
            assert x.student.quality is not None and x.teacher.quality is not None
            losses.append(
                quality_loss(
                    x.student.quality,
                    x.teacher.quality,
                    weight * x.valid() if self.mask_padding else weight,
                    normalizer=normalizer,
                )
            )
        return torch.stack(losses).sum()

    def _boxes(
        self,
        pairs: list[PredictionPair],
        weights: list[Tensor],
        step: Step,
        normalizer: float | Tensor,
    ) -> list[Tensor]:
        if pairs[0].teacher.distributions is None:
            return [
                box_loss(
                    x.student.boxes, x.teacher.boxes, w, normalizer=normalizer, distance=self.box
                )
                for x, w in zip(pairs, weights, strict=True)
            ]
        total = step.mean(torch.stack([w.sum() for w in weights]).sum()).clamp(min=1)
        losses = []
        for x, w in zip(pairs, weights, strict=True):
            assert x.student.distributions is not None and x.teacher.distributions is not None
            losses.append(
                bin_loss(x.student.distributions, x.teacher.distributions, w, total_weight=total)
            )
        return losses


def _compare(entry: Pair, cross: DensePredictions, own: DensePredictions) -> PredictionPair:
    """Bring the cross-head prediction of a level and the teacher's own together."""
    index = level_of(entry, own)
    size = entry.student.shape[2], entry.student.shape[3]
    return PredictionPair(
        name=entry.name,
        grid=Grid(*size, entry.stride, own.offset),
        student=cross.level(index, size),
        teacher=own.level(index, size),
        anchors=own.anchors[index] if own.anchors else None,
        image_sizes=entry.image_sizes,
        masks=entry.masks,
    )


def _total(weights: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
    return torch.stack([(w * v).sum() for w, v in zip(weights, valid, strict=True)]).sum()
