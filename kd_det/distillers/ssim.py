"""
SSIM-KD: structural similarity between paired feature maps.

Paper: de Rijk, Schneider, Cordts, Gavrila, "Structural Knowledge Distillation for Object
Detection", NeurIPS 2022 (arXiv 2211.13133).

    L = sum over neck levels of  mean over n, c, h, w of  (1 - l^a c^b s^g) / 2

l, c, s are the luminance, contrast and structure terms in an 11x11 Gaussian window, per channel, on
maps that were min-max normalised; the student's pass a 1x1 convolution first where channels differ.
The detector's own losses stay as they are; the weight (lambda) is 2 or 4.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from torch import Tensor

from kd_det.distillers.base import DISTILLER_REGISTRY, AdapterMode, Pair
from kd_det.distillers.pyramid import PyramidDistiller
from kd_det.functional.ssim import SSIMOptions, ssim_loss, ssim_map


@DISTILLER_REGISTRY.register()
class SSIM(PyramidDistiller):
    """Sum over paired levels of the mean structural dissimilarity."""

    config_key = "SSIM"
    # Structure may lead where features are still to be learnt, and takes room where they are there.
    share = share_of_kin = 3.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the keys of KD.SSIM. The paper weighs it by lambda, 2 or 4."""
        super().add_config(node)
        # Odd number of cells per side of the window; "gaussian" of SIGMA cells, or "box".
        node.WINDOW_SIZE = 11
        node.SIGMA = 1.5
        node.WINDOW = "gaussian"
        # At the border: "reflect" (the reference code's), "renorm" (rescale what lies inside), or
        # "valid".
        node.BORDER = "reflect"
        # What shares one min-max range: each "channel" of each image, each "image", the whole
        # "level", or "none". The paper does not say; "channel" is what its reference library
        # offers.
        node.NORMALIZE = "channel"
        # Exponents, each 0 or 1, of the luminance, contrast and structure terms (the paper's
        # ablation).
        node.EXPONENTS = [1, 1, 1]

    def __init__(
        self,
        *,
        window_size: int = 11,
        sigma: float = 1.5,
        window: str = "gaussian",
        border: str = "reflect",
        normalize: str = "channel",
        exponents: Sequence[int] = (1, 1, 1),
        mask_padding: bool = False,
        student_capture: str = "backbone",
        teacher_capture: str = "backbone",
        adapter: AdapterMode = "auto",
    ) -> None:
        """
        Args:
            window_size, sigma, window, border, normalize, exponents: see
                `functional.ssim.SSIMOptions`.
            mask_padding, student_capture, teacher_capture, adapter: see `PyramidDistiller`.

        Raises:
            ValueError: an option is out of its range.
        """
        super().__init__(
            mask_padding=mask_padding,
            student_capture=student_capture,
            teacher_capture=teacher_capture,
            adapter=adapter,
        )
        luminance, contrast, structure = exponents
        self.options = SSIMOptions(
            window_size=window_size,
            sigma=sigma,
            window=window,
            border=border,
            normalize=normalize,
            exponents=(luminance, contrast, structure),
        )

    def distance(self, pair: Pair, mask: Tensor | None) -> Tensor:
        """Return the mean structural dissimilarity of a pair."""
        return ssim_loss(pair.student, pair.teacher, self.options, mask)

    def similarity(self, pair: Pair) -> Tensor:
        """Return the SSIM of a pair at every position, (N, C, H, W) in [-1, 1], for pictures."""
        return ssim_map(pair.student, pair.teacher, self.options)
