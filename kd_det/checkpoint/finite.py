"""No checkpoint of a model that has diverged."""

import itertools

import torch
from torch import nn


def refuse_non_finite(model: nn.Module, name: str) -> None:
    """
    Refuse to save a model of which the last update left no numbers.

    Args:
        model: what is trained, on any device.
        name: of the checkpoint that is not written.

    Raises:
        FloatingPointError: a parameter holds NaN or infinity, or a buffer NaN (one may be infinite
            on purpose); the message names them.
    """
    parameters = dict(model.named_parameters())
    broken = [key for key, value in parameters.items() if not torch.isfinite(value).all()]
    buffers = ((k, v) for k, v in model.named_buffers() if v.is_floating_point())
    broken += [key for key, value in buffers if torch.isnan(value).any()]
    if broken:
        total = sum(1 for _ in itertools.chain(parameters, model.buffers()))
        raise FloatingPointError(
            f"{name} is not saved, since {len(broken)} of the model's {total} tensors are not "
            f"finite after the last update: {', '.join(broken[:8])}"
            f"{', ...' if len(broken) > 8 else ''}; the checkpoints before it are kept. Lower "
            "SOLVER.BASE_LR, or clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), and go on "
            "from them with --resume."
        )
