"""From a checkpoint to a file of the zoo: the model alone, its weights at half precision."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kd_det.files import write_whole
from kd_det.reading import load_tensors
from kd_det.zoo.index import weights_path


def export_weights(checkpoint: Path, name: str, folder: Path | None = None) -> Path:
    """
    Write the zoo's file of a checkpoint.

    Args:
        checkpoint: a checkpoint of kd_det or Detectron2, with the model under "model".
        name: the teacher's name in the zoo, like "shapes2/fcos_r18".
        folder: another zoo's folder, instead of the package's.

    Returns:
        The file's path.

    Raises:
        ValueError: the checkpoint holds no model, or a number that half precision cannot hold.
    """
    content = load_tensors(checkpoint)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{checkpoint} has no `model`; give a checkpoint of a training run.")
    path = weights_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = halve(content["model"])
    write_whole(path, lambda file: torch.save({"model": half}, file))
    return path


def halve(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Return a state dict whose matrices and filters are float16.

    Vectors (biases, affine parameters, running statistics) keep their precision: they are a
    hundredth of the numbers, and small variances would lose most of theirs.

    Raises:
        ValueError: a number beyond 65504, or none; the message names the tensor.
    """
    out = {}
    for key, tensor in state.items():
        short = tensor.is_floating_point() and tensor.dim() > 1
        out[key] = tensor.half() if short else tensor.clone()
        if short and not torch.isfinite(out[key]).all():
            raise ValueError(f"{key} holds {tensor.abs().max():g}, which is no float16 number.")
    return out
