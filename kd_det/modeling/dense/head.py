"""The head ATSS and GFL share: RetinaNet's two towers with one prediction per position."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from kd_det.modeling.norms import head_norm


class DenseHead(RetinaNetHead):
    """
    RetinaNet's head for one prediction per position, a learnable scale per level, and a quality.

    Module names are those of Detectron2's RetinaNetHead (`cls_subnet`, `bbox_subnet`, `cls_score`,
    `bbox_pred`); `scales` multiplies the box output of each level, and `quality` is one more output
    of the box tower.

    Args:
        input_shape: the pyramid levels; all of the same width.
        num_classes: K.
        num_convs: convolutions per tower.
        norm: Detectron2 norm name of the towers.
        prior_prob: class probability the fresh head predicts everywhere.
        box_outputs: D, numbers per position that describe the box.
        with_quality: whether there is a quality output.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_convs: int,
        norm: str,
        prior_prob: float = 0.01,
        box_outputs: int = 4,
        with_quality: bool = False,
    ) -> None:
        channels = input_shape[0].channels
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=1,
            conv_dims=[channels] * num_convs,
            norm=head_norm(norm),
            prior_prob=prior_prob,
        )
        self.bbox_pred = prediction_conv(channels, box_outputs)
        self.quality = prediction_conv(channels, 1) if with_quality else None
        self.scales = nn.ParameterList(
            nn.Parameter(self.bbox_pred.weight.new_ones(())) for _ in input_shape
        )

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """
        Predict classes, boxes and, where there is such a branch, qualities.

        Args:
            features: per level, (N, C, H, W).

        Returns:
            Per level, before any activation: class logits (N, K, H, W), box outputs (N, D, H, W)
            and, with quality, its logits (N, 1, H, W).
        """
        if len(features) != len(self.scales):
            raise ValueError(
                f"The head was built for {len(self.scales)} levels, found {len(features)}."
            )
        logits, boxes, qualities = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            box_feature = self.bbox_subnet(feature)
            boxes.append(self.bbox_pred(box_feature) * scale)
            if self.quality is not None:
                qualities.append(self.quality(box_feature))
        return (logits, boxes) if self.quality is None else (logits, boxes, qualities)


def prediction_conv(
    channels: int, outputs: int, *, kernel_size: int = 3, bias: float = 0.0
) -> nn.Conv2d:
    """Return a convolution that keeps the map's size, initialised as RetinaNetHead does."""
    conv = nn.Conv2d(channels, outputs, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
    return conv
