"""What a LazyConfig says of a model: the plain one, or the student inside kd_det's wrapper."""

from dataclasses import dataclass
from typing import Any

from detectron2.config import instantiate
from torch import nn

from kd_det.distillation.views import View

_WRAPPERS = ("distill", "DistillationDetector")


@dataclass(frozen=True)
class PlainModel:
    """
    A model that works alone.

    Attributes:
        model: a Detectron2 model.
        view: what it sees of the loaded image.
    """

    model: nn.Module
    view: View


def plain_model(lazy: Any) -> PlainModel:
    """
    Build the model of a LazyConfig without its teacher.

    Args:
        lazy: the config, as `load_lazy` returns it.
    """
    node = lazy.model
    if not distils(node):
        return PlainModel(instantiate(node), View())
    if "view" in node and node.view is not None:
        view = instantiate(node.view)
    else:
        view = View(
            node.get("view_factor", 1.0), node.get("view_interpolation", View.interpolation)
        )
    return PlainModel(instantiate(node.student), view)


def distils(node: Any) -> bool:
    """Return whether a `model` is kd_det's wrapper: `L(distill)` or `L(DistillationDetector)`."""
    target = node.get("_target_")
    name = target if isinstance(target, str) else getattr(target, "__qualname__", "")
    return name.rpartition(".")[2] in _WRAPPERS


def input_format(lazy: Any, model: nn.Module) -> str:
    """Return the pixel format that a model takes: its own word, its mapper's, or Detectron2's."""
    own = getattr(model, "input_format", None)
    mapper = lazy.get("dataloader", {}).get("train", {}).get("mapper", {})
    return str(own or mapper.get("image_format") or "BGR")
