"""The libraries that `kd_det.bench.ssim` compares with, each as the same loss."""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kd_det.functional.ssim import min_max_normalize, ssim_loss

OWN = "kd_det"
Loss = Callable[[Tensor, Tensor], Tensor]


class Library(NamedTuple):
    """A library's loss and the border rule that it follows."""

    version: str
    border: str
    loss: Loss


def load_libraries() -> dict[str, Library]:
    """Import every library; the error for a missing one says how to install it."""
    kornia, msssim, piq = map(_require, ("kornia", "pytorch_msssim", "piq"))
    metrics = _require("torchmetrics.functional.image")

    def with_kornia(student: Tensor, teacher: Tensor) -> Tensor:
        scale = kornia.enhance.normalize_min_max
        loss: Tensor = kornia.losses.ssim_loss(scale(student), scale(teacher), window_size=11)
        return loss

    def with_similarity(ssim: Callable[..., Tensor], **options: Any) -> Loss:
        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            maps = min_max_normalize(student), min_max_normalize(teacher)
            return (1 - ssim(*maps, **options)) / 2

        return loss

    torchmetrics_ssim = metrics.structural_similarity_index_measure
    losses: dict[str, tuple[str, Loss]] = {
        OWN: ("reflect", ssim_loss),
        "kornia": ("reflect", with_kornia),
        "torchmetrics": ("reflect", with_similarity(torchmetrics_ssim, data_range=1.0)),
        "pytorch-msssim": ("valid", with_similarity(msssim.ssim, data_range=1.0)),
        "piq": ("valid", with_similarity(piq.ssim, data_range=1.0, downsample=False)),
    }
    return {
        name: Library(importlib.metadata.version(name), border, loss)
        for name, (border, loss) in losses.items()
    }


def _require(module: str) -> Any:
    try:
        with warnings.catch_warnings():  # kornia compiles functions with torch.jit on import
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"kd-det bench ssim compares with {module}, which is not installed: "
            "run `uv sync --group bench` (kornia needs Python 3.11)"
        ) from error
