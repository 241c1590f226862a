"""
Running statistics of BatchNorm per branch of an aligned detector.

One backbone that sees full and reduced images in each step trains on the statistics of each batch,
but keeps one running mean, a blend of both; evaluation then normalises neither resolution as
training did. Here each BatchNorm owns further buffers, e.g. `low_running_mean` beside
`running_mean`, and the affine parameters stay shared.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def split_statistics(module: nn.Module, branch: str) -> int:
    """
    Give every BatchNorm inside `module` buffers of its own for `branch`, equal to the present ones.

    Args:
        module: searched recursively; layers without running statistics (FrozenBN, GN) are left.
        branch: prefix of the new buffers' names.

    Returns:
        How many layers were given buffers.
    """
    layers = _normalisations(module)
    for layer in layers:
        for name in STATISTICS:
            layer.register_buffer(f"{branch}_{name}", getattr(layer, name).clone())
    return len(layers)


@contextlib.contextmanager
def statistics_of(module: nn.Module, branch: str) -> Iterator[None]:
    """Inside, BatchNorm layers read and update their buffers of `branch`, where they have some."""
    layers = [x for x in _normalisations(module) if f"{branch}_running_mean" in x._buffers]
    _swap(layers, branch)
    try:
        yield
    finally:
        _swap(layers, branch)


def state_of(module: nn.Module, branch: str) -> dict[str, Tensor]:
    """
    Return the state dict that `module` would have without further buffers, as `branch` sees it.

    Args:
        module: any module.
        branch: whose statistics are returned under the usual names; a branch without buffers of its
            own gives the usual ones.
    """
    with statistics_of(module, branch):
        state = module.state_dict()
    for name, layer in module.named_modules():
        for key in _further_buffers(layer):
            del state[f"{name}.{key}"]
    return state


def _normalisations(module: nn.Module) -> list[_BatchNorm]:
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]


def _further_buffers(layer: nn.Module) -> list[str]:
    if not isinstance(layer, _BatchNorm):
        return []
    return [key for key in layer._buffers if key not in STATISTICS and key.endswith(STATISTICS)]


def _swap(layers: list[_BatchNorm], branch: str) -> None:
    """Exchange the tensors, not their contents: DDP and checkpoints refer to tensors."""
    for layer in layers:
        buffers = layer._buffers
        for name in STATISTICS:
            own = f"{branch}_{name}"
            buffers[name], buffers[own] = buffers[own], buffers[name]
