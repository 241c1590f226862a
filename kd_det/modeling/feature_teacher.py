"""
A teacher that is no detector: any timm model (ViT included) that gives feature maps.

It brings its own normalisation and colour order, those that timm's data config says its weights
were trained with, whatever INPUT.FORMAT and MODEL.PIXEL_MEAN say. Its maps, one per stride, pair
with a student's by stride like any other; it has no head, so only distillers of features apply.
"""

import os
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from kd_det.modeling.backbones.packaged_weights import PREFIX, load_packaged_weights
from kd_det.modeling.backbones.timm_backbone import maps_of
from kd_det.modeling.registering import register_in
from kd_det.reading import load_checkpoint
from kd_det.text import some

# What lets a model take images of any size, as far as its kind of model has such an option.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})


class TimmMaps(nn.Module):
    """
    The deepest map of each stride of a timm model.

    Args:
        body: made with `features_only`.

    Attributes:
        strides: pixels per cell, from fine to coarse; the map of stride 16 is called "s16".
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self._order = list(body.feature_info.reduction())
        self.strides = sorted(set(self._order))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return {"s<stride>": (N, C, H / stride, W / stride)} for images (N, 3, H, W)."""
        maps = dict(zip(self._order, maps_of(self.body, x), strict=True))
        return {f"s{stride}": maps[stride] for stride in self.strides}


@register_in(META_ARCH_REGISTRY)
class TimmFeatures(nn.Module):
    """
    A timm model as a meta-architecture: a frozen teacher of features, with its own weights.

    Args:
        name: of a timm model.
        pretrained: download timm's weights for it.
        weights: package://<name> of an installed package, or a file with the state dict of the
            whole model under timm's names (its classifier may be missing).
        input_format: "RGB" or "BGR", of the images that it is given.

    Attributes:
        ready_made: there is nothing to train before it can teach.
        backbone: gives the maps; what distillers capture.
        size_divisibility: images are padded to multiples of it.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: there is no such file of weights.
        ValueError: no weights, those of another net, or a model that cannot take images of any
            size.
    """

    ready_made: ClassVar[bool] = True

    @configurable
    def __init__(self, *, name: str, pretrained: bool, weights: str, input_format: str) -> None:
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is {input_format!r}; a timm model takes RGB, so expected 'RGB' or "
                "'BGR', of which the other is made."
            )
        body = _features_of(name, _weights_of(name, pretrained, weights))
        self.backbone = TimmMaps(body)
        self.size_divisibility = max(self.backbone.strides)
        _try_sizes(self.backbone, name)
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(body)
        for key, values in (("pixel_mean", found["mean"]), ("pixel_std", found["std"])):
            self.register_buffer(key, 255 * torch.tensor(values).view(-1, 1, 1), persistent=False)
        self._flip = input_format == "BGR"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Translate MODEL.TIMM and INPUT.FORMAT."""
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "pretrained": cfg.MODEL.TIMM.PRETRAINED,
            "weights": cfg.MODEL.TIMM.WEIGHTS,
            "input_format": cfg.INPUT.FORMAT,
        }

    @staticmethod
    def use_weights(cfg: CfgNode, weights: str) -> None:
        """Let a config take its weights from KD.TEACHER.WEIGHTS."""
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, weights

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Return the maps of a batch of Detectron2's inputs.

        Raises:
            RuntimeError: it is to be trained.
        """
        if self.training:
            raise RuntimeError(
                "TimmFeatures is a teacher of features, with no head and no loss: name it in a "
                "teacher's config (KD.TEACHER.CONFIG_FILE), and train a detector."
            )
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
        images = [item["image"].to(mean.device) for item in batched_inputs]
        images = [((x.flip(0) if self._flip else x) - mean) / std for x in images]
        padded = ImageList.from_tensors(images, self.size_divisibility)
        maps: dict[str, Tensor] = self.backbone(padded.tensor)
        return maps


def _weights_of(name: str, pretrained: bool, weights: str) -> dict[str, Tensor] | None:
    """Return a whole model's state dict; None: timm's own is to be downloaded."""
    if pretrained == bool(weights):
        raise ValueError(
            f"The feature teacher {name} needs weights from one place: set MODEL.TIMM.PRETRAINED "
            "True in its config (timm downloads them), or MODEL.TIMM.WEIGHTS, or the student's "
            f"KD.TEACHER.WEIGHTS; found PRETRAINED {pretrained} and WEIGHTS {weights!r}."
        )
    if pretrained:
        return None
    whole = _create(name)
    if weights.startswith(PREFIX):
        load_packaged_weights(whole, weights)
        return dict(whole.state_dict())
    path = PathManager.get_local_path(weights)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"The weights of the feature teacher {name}, {weights}, are absent."
        )
    given = load_checkpoint(path)
    for wrapper in ("model", "state_dict"):
        given = given.get(wrapper, given)
    given = {key: torch.as_tensor(value) for key, value in given.items()}
    own = whole.state_dict()
    head = tuple(f"{part}." for part in _names(whole.pretrained_cfg.get("classifier")))
    missing = [key for key in own if key not in given and not key.startswith(head)]
    stray = [key for key in given if key not in own and not key.startswith(head)]
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape and not key.startswith(head)
    ]
    problems = {"missing": missing, "left over": stray, "of another shape": shapes}
    if any(problems.values()):
        lists = "; ".join(f"{what} ({len(keys)}): {some(keys)}" for what, keys in problems.items())
        raise ValueError(
            f"{weights} does not hold the weights of timm's {name}: {lists}. Give the state dict "
            "of that model under timm's names, or the MODEL.TIMM.NAME that it is of."
        )
    # What remains is the classifier, which no map comes from.
    return {key: own[key] if key.startswith(head) else given[key] for key in own}


def _names(classifier: Any) -> tuple[str, ...]:
    """Return timm's names of a model's classifiers: none, one or several."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def _create(name: str, **options: Any) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"The feature teacher {name} comes from timm, which is not installed: run "
            "`pip install 'timm>=1.0'` (kd_det's extra `timm`)."
        ) from error
    return timm.create_model(name, **options)


def _features_of(name: str, state: dict[str, Tensor] | None) -> Any:
    """Make the model as one of features, with what lets it take any size where it can."""
    source: dict[str, Any] = {"pretrained": True}
    if state is not None:
        source["pretrained_cfg_overlay"] = {"state_dict": state}
    body = None
    for option in _ANY_SIZE:
        try:
            found = _create(name, features_only=True, **source, **option).eval()
        except TypeError:  # this kind of model has no such option
            continue
        if body is None:
            body = found
        if _fails(TimmMaps(found)) is None:
            return found
    return body


def _try_sizes(maps: TimmMaps, name: str) -> None:
    if error := _fails(maps):
        raise ValueError(
            f"timm's {name} cannot take images of any size ({type(error).__name__}: {error}); "
            "take a model without absolute positions or windows, or a ViT that timm can resize "
            "(dynamic_img_size)."
        )


@torch.no_grad()
def _fails(maps: TimmMaps) -> Exception | None:
    """Return what is wrong with an image that is no square of a usual size."""
    side = max(maps.strides)
    try:
        found = maps(torch.zeros(1, 3, 3 * side, 5 * side))
    except (AssertionError, RuntimeError, ValueError) as error:
        return error
    for stride, x in zip(maps.strides, found.values(), strict=True):
        if x.shape[-2:] != (3 * side // stride, 5 * side // stride):
            return ValueError(f"its map of stride {stride} is {tuple(x.shape)}")
    return None
