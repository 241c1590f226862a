"""One optimisation step: forward, backward, and the checks that a broken loss never gets past."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from torch import Tensor, nn

from kd_det.engine.divergence import describe_non_finite, explained


class TrainingLoop(SimpleTrainer):
    """
    Detectron2's simple trainer, on any device, with or without mixed precision.

    Without mixed precision it takes the same steps as Detectron2's, bit for bit.

    Args:
        model: returns a dict of losses.
        data_loader: yields batches; it is first asked at the first step, so that resuming can set
            where it starts.
        optimizer: steps after every batch.
        amp: autocast the model: float16 with loss scaling on CUDA, bfloat16 elsewhere.
        clip_norm: largest L2 norm of all gradients together; None does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        TrainerBase.__init__(self)
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = 1  # later versions of `SimpleTrainer` read it
        self._batches: Iterator[Any] | None = None
        self._last_losses: dict[str, float] = {}
        self._device_type = next(model.parameters()).device.type
        self._amp_dtype = torch.float16 if self._device_type == "cuda" else torch.bfloat16
        self._amp = amp
        self._clip_norm = clip_norm
        scale = amp and self._amp_dtype == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device_type, enabled=scale)

    def run_step(self) -> None:
        """Take one step; see `SimpleTrainer`."""
        if not self.model.training:
            raise RuntimeError("The model was switched to evaluation mode during training.")
        start = time.perf_counter()
        if self._batches is None:
            # A starting loader draws one random number; a resumed run has drawn it already.
            with torch.random.fork_rng(devices=[], enabled=self.iter > 0):
                self._batches = iter(self.data_loader)
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        with self._autocast(), explained(self.iter, self._last_losses, batch):
            loss_dict: dict[str, Tensor] = self.model(batch)
            losses: Any = sum(loss_dict.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(losses).backward()
        self._check_finite(loss_dict, batch)
        self._write_metrics(loss_dict, data_time)
        if self._clip_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if not self._amp:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._amp_dtype)

    def _check_finite(self, losses: dict[str, Tensor], batch: Sequence[dict[str, Any]]) -> None:
        values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
        self._last_losses = dict(zip(losses, values, strict=True))
        if problem := describe_non_finite(self.iter, self._last_losses, batch):
            raise FloatingPointError(problem)

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, optimizer and loss scale."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"]:  # empty: the run had no mixed precision before
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
