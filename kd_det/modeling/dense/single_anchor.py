"""What ATSS and GFL share: one square anchor per position, ATSS assignment, selection and NMS."""

import abc
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.functional.distance import at_least_float32
from kd_det.functional.reduce import mean_number_over_processes
from kd_det.modeling.backbones.fpn import pick_features
from kd_det.modeling.dense.atss_assigner import Positives, find_positives
from kd_det.modeling.dense.head import DenseHead
from kd_det.modeling.dense.inference import InferenceSettings, suppress

# The loss normaliser of Detectron2's detectors starts here and follows the number of positives.
_INITIAL_POSITIVES = 100


class SingleAnchorDetector(DenseDetector, abc.ABC):
    """
    A dense detector with one square anchor per position and the assignment of ATSS.

    Subclasses say how a box is decoded and what the losses are.

    Args:
        backbone: a Detectron2 backbone.
        head: maps levels to lists of class logits, box outputs and possibly qualities.
        head_in_features: the pyramid levels the head sees, finest first.
        num_classes: K.
        anchor_scale: side of an anchor in units of its level's stride.
        anchor_offset: centre of the first anchor in units of the stride, in [0, 1).
        assign_topk: candidates per ground-truth box and level.
        inference: how predictions become detections.
        pixel_mean: per channel, in the order of the input's channels.
        pixel_std: per channel.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        num_classes: int,
        anchor_scale: float,
        anchor_offset: float,
        assign_topk: int,
        inference: InferenceSettings,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.num_classes = num_classes
        self.assign_topk = assign_topk
        self.inference_settings = inference
        self.anchor_scale = anchor_scale
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=anchor_offset,
        )

    @abc.abstractmethod
    def decode_boxes(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """
        Turn the head's box outputs into boxes.

        Args:
            outputs: (P, D), float32.
            anchors: (P, 4) corners in pixels.

        Returns:
            (P, 4) corners in pixels, not clipped to the image.
        """

    @abc.abstractmethod
    def losses(
        self, flat: list[Tensor], positives: Positives, normalizer: float
    ) -> dict[str, Tensor]:
        """
        Compute the named losses.

        Args:
            flat: the head's outputs, each (N * R, D), at least float32.
            positives: the anchors that have a box.
            normalizer: moving average of the positives per batch and process, at least about 1.

        Returns:
            Scalars by name, attached to every output of the head even without positives.
        """

    def scores(self, probabilities: Tensor, quality: Tensor | None) -> Tensor:
        """
        Rank the detections of one level of an image.

        Args:
            probabilities: (R, K) class probabilities.
            quality: (R, 1) logits of the quality branch, None where the head has none.

        Returns:
            (R, K) scores in [0, 1].
        """
        return probabilities

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of one batch; see `DenseDetector.forward`."""
        with torch.autocast(self.device.type, enabled=False):
            flat = [torch.cat(levels, dim=1).flatten(0, 1) for levels in _flatten(predictions)]
            positives = self.label_anchors(self.anchor_generator(features), gt_instances)
            count = len(positives.index)
            get_event_storage().put_scalar("num_pos_anchors", count / len(gt_instances))
            mean = mean_number_over_processes(count, self.device)
            normalizer = self._ema_update("loss_normalizer", max(mean, 1), _INITIAL_POSITIVES)
            return self.losses(flat, positives, normalizer)

    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Positives:
        """
        Assign the anchors of a batch to its ground truth.

        Args:
            anchors: per level, R_l boxes, the same for all images.
            gt_instances: one per image, with `gt_boxes` and `gt_classes`.

        Returns:
            The positives of all images.
        """
        return find_positives(
            [level.tensor for level in anchors],
            [instances.gt_boxes.tensor for instances in gt_instances],
            [instances.gt_classes for instances in gt_instances],
            topk=self.assign_topk,
        )

    def class_targets(self, logits: Tensor, positives: Positives, values: Tensor) -> Tensor:
        """Return (N * R, K): `values` (P,) at each positive's own class, 0 elsewhere."""
        targets = torch.zeros_like(logits)
        targets[positives.index, positives.classes] = values
        return targets

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
    ) -> list[Instances]:
        """Return the detections of each image, in its own pixels; see `DenseDetector.forward`."""
        levels = _flatten(predictions)
        anchors = [boxes.tensor for boxes in self.anchor_generator(features)]
        results = []
        for i, image_size in enumerate(images.image_sizes):
            found = [
                self._detect(anchors[level], [output[level][i] for output in levels])
                for level in range(len(anchors))
            ]
            boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
            results.append(suppress(image_size, boxes, scores, classes, self.inference_settings))
        return results

    def _detect(self, anchors: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best candidates of one level of an image: boxes, scores and classes."""
        probabilities = outputs[0].sigmoid()
        scores = self.scores(probabilities, outputs[2] if len(outputs) > 2 else None)
        position, classes = (probabilities > self.inference_settings.score_thresh).nonzero().T
        found = scores[position, classes]
        scores, best = found.topk(min(self.inference_settings.topk_candidates, len(found)))
        position, classes = position[best], classes[best]
        return self.decode_boxes(outputs[1][position], anchors[position]), scores, classes


def shared_arguments(
    cfg: CfgNode, name: str, *, box_outputs: int, with_quality: bool
) -> dict[str, Any]:
    """
    Read what MODEL.ATSS and MODEL.GFL have in common.

    Args:
        cfg: the config.
        name: "ATSS" or "GFL".
        box_outputs: numbers per position that describe the box.
        with_quality: whether the head has a quality branch.

    Returns:
        The arguments of `SingleAnchorDetector.__init__`, the backbone and the head built.

    Raises:
        ValueError: a level of IN_FEATURES that the backbone lacks, a count below 1, or an anchor
            without size.
    """
    keys = cfg.MODEL[name]
    backbone = build_backbone(cfg)
    input_shape = pick_features(backbone, keys.IN_FEATURES, f"MODEL.{name}.IN_FEATURES")
    for key in ("NUM_CONVS", "TOPK", "REG_MAX"):
        if key in keys and keys[key] < 1:
            raise ValueError(f"MODEL.{name}.{key} is {keys[key]}, expected at least 1.")
    if keys.ANCHOR_SCALE <= 0:
        raise ValueError(f"MODEL.{name}.ANCHOR_SCALE is {keys.ANCHOR_SCALE}, expected above 0.")
    head = DenseHead(
        input_shape=input_shape,
        num_classes=keys.NUM_CLASSES,
        num_convs=keys.NUM_CONVS,
        norm=keys.NORM,
        prior_prob=keys.PRIOR_PROB,
        box_outputs=box_outputs,
        with_quality=with_quality,
    )
    inference = InferenceSettings(
        score_thresh=keys.SCORE_THRESH_TEST,
        topk_candidates=keys.TOPK_CANDIDATES_TEST,
        nms_thresh=keys.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return {
        "backbone": backbone,
        "head": head,
        "head_in_features": keys.IN_FEATURES,
        "num_classes": keys.NUM_CLASSES,
        "anchor_scale": keys.ANCHOR_SCALE,
        "anchor_offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        "assign_topk": keys.TOPK,
        "inference": inference,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _flatten(predictions: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Turn (N, D, H, W) of every output and level into (N, H * W, D), at least float32."""
    return [
        [at_least_float32(x).flatten(2).transpose(1, 2) for x in levels] for levels in predictions
    ]
