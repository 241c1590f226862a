"""What each of several processes has of its own: random state, loss normaliser, buffers."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from kd_det.checkpoint.state import loss_normalizers, set_loss_normalizers


class GatherProcessStates(HookBase):
    """
    Brings the state of every process to the first one, which writes the checkpoints.

    Stands before the hook that writes them, in every process, since gathering takes all of them. A
    checkpoint at another step than these (after Ctrl-C) has the first process's state alone.

    Args:
        model: the one that is trained.
        period: steps between two checkpoints.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self._model, self._period = model, period
        self._iteration = -1
        self._states: list[Any] = []

    def after_step(self) -> None:
        """Gather, where a checkpoint follows."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            self._states = comm.gather(process_state(self._model))
            self._iteration = self.trainer.iter

    def at(self, iteration: int) -> list[Any]:
        """Return the states by process that were gathered in an iteration; [] if none were."""
        return self._states if iteration == self._iteration else []


def process_state(model: nn.Module) -> dict[str, Any]:
    """Return what this process goes on with, beside what all processes have in common."""
    return {"random": random_state(), "loss_normalizer": loss_normalizers(model)}


def set_process_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Restore what `process_state` returned."""
    set_random_state(state["random"])
    set_loss_normalizers(model, state["loss_normalizer"])


def share_buffers(model: nn.Module) -> None:
    """
    Give every process the first one's buffers: those that ship.

    While they train, each process has BatchNorm statistics of its own.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def random_state() -> dict[str, Any]:
    """Return the generators' states as tensors and numbers, which the safe unpickler reads."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, float(cached))
    )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
