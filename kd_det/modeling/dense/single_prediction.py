"""What detectors with one prediction per position share: keys, grid, selection and NMS."""

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from kd_det.distillers.predictions import DensePredictions, HeadOutputs, register_decoder
from kd_det.functional.precision import at_least_float32
from kd_det.modeling.backbones.fpn import pick_features
from kd_det.modeling.dense.decoding import decode_levels
from kd_det.modeling.dense.head import DenseHead
from kd_det.modeling.dense.single_prediction_options import SinglePredictionOptions
from kd_det.modeling.options import add_keys, defaults_of, read_options


class SinglePredictionDetector(DenseDetector, abc.ABC):
    """
    A dense detector with one prediction per position of the pyramid.

    Each position is the centre of a square anchor of `options.anchor_side()` strides, which tells
    its place and its stride. Subclasses name their options, and say how a box is decoded and what
    the losses are.

    Args:
        backbone: a Detectron2 backbone.
        head: `DenseHead`, or another that maps levels to lists of class logits, box outputs
            (`options.box_outputs()` each) and, for `with_quality`, qualities.
        options: as the keys of the detector's node, which say what each is.
        pixel_mean, pixel_std: per channel, in the order of the input's channels.
        anchor_offset: centre of the first anchor in units of the stride, in [0, 1).
        max_detections: detections kept per image.
    """

    options_type: ClassVar[type[SinglePredictionOptions]]
    with_quality: ClassVar[bool]

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        options: SinglePredictionOptions,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        anchor_offset: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            backbone, head, options.in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.options = options
        self.num_classes = options.num_classes
        self.max_detections = max_detections
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in options.in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[options.anchor_side() * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=anchor_offset,
        )

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add the node of the detector's options to MODEL."""
        add_keys(cfg.MODEL, cls.options_type.node, defaults_of(cls.options_type))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """
        Read the arguments of `__init__` from a config; build the backbone and the head.

        Raises:
            ValueError: an option out of its range, or a level of IN_FEATURES that the backbone
                lacks.
        """
        node = cls.options_type.node
        options = read_options(cls.options_type, cfg.MODEL[node])
        backbone = build_backbone(cfg)
        levels = pick_features(backbone, options.in_features, f"MODEL.{node}.IN_FEATURES")
        return {
            "backbone": backbone,
            "head": cls.build_head(options, levels),
            "options": options,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "anchor_offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @classmethod
    def build_head(cls, options: Any, levels: list[ShapeSpec]) -> nn.Module:
        """
        Build the head from the options of the detector.

        Args:
            options: an `options_type`.
            levels: the pyramid levels it reads.
        """
        return DenseHead(
            input_shape=levels,
            num_classes=options.num_classes,
            num_convs=options.num_convs,
            norm=options.norm,
            prior_prob=options.prior_prob,
            box_outputs=options.box_outputs(),
            with_quality=cls.with_quality,
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
    def losses_of_batch(
        self, outputs: list[Tensor], anchors: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Assign the ground truth and compute the named losses; autocast is off.

        Args:
            outputs: of the head, each (N, R, D) of all levels, at least float32.
            anchors: per level, (R_l, 4) corners in pixels, the same for all images.
            gt_instances: one per image, with `gt_boxes` and `gt_classes`.

        Returns:
            Scalars by name, attached to every output of the head even without objects.
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
            outputs = [torch.cat(levels, dim=1) for levels in _flatten(predictions)]
            anchors = [boxes.tensor for boxes in self.anchor_generator(features)]
            return self.losses_of_batch(outputs, anchors, gt_instances)

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
            keep = batched_nms(boxes, scores, classes, self.options.nms_thresh_test)
            keep = keep[: self.max_detections]
            detections = Instances(image_size)
            detections.pred_boxes = Boxes(boxes[keep])
            detections.scores, detections.pred_classes = scores[keep], classes[keep]
            results.append(detections)
        return results

    def _detect(self, anchors: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best candidates of one level of an image: boxes, scores and classes."""
        probabilities = outputs[0].sigmoid()
        scores = self.scores(probabilities, outputs[2] if len(outputs) > 2 else None)
        position, classes = (probabilities > self.options.score_thresh_test).nonzero().T
        found = scores[position, classes]
        scores, best = found.topk(min(self.options.topk_candidates_test, len(found)))
        position, classes = position[best], classes[best]
        return self.decode_boxes(outputs[1][position], anchors[position]), scores, classes


@register_decoder(SinglePredictionDetector)
def _decode(model: SinglePredictionDetector, head_outputs: HeadOutputs) -> DensePredictions:
    found = decode_levels(model, head_outputs, model.decode_boxes)
    # RepPoints' third output is points.
    if not model.with_quality or len(head_outputs) < 3:
        return found
    return replace(found, quality=[at_least_float32(x).flatten(1) for x in head_outputs[2]])


def _flatten(predictions: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Turn (N, D, H, W) of every output and level into (N, H * W, D), at least float32."""
    return [
        [permute_to_N_HWA_K(at_least_float32(x), x.shape[1]) for x in levels]
        for levels in predictions
    ]
