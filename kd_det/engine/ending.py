"""How a training ends early: asked to, with a checkpoint; or with the process that started it."""

import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from kd_det.functional.reduce import sum_over_processes

_logger = logging.getLogger(__name__)
#: Set for a process whose standard input is a pipe from the one that started it and waits for it.
PARENT_PIPE = "KD_DET_PARENT_PIPE"
# A step and a checkpoint; after that nobody waits any longer.
_GRACE_SECONDS = 30.0
# One process that stopped by itself would leave the others waiting for it.
_STEPS_BETWEEN_QUESTIONS = 10


class StopWhenAsked(HookBase):
    """
    On Ctrl-C or a termination signal, ends the step under way, saves a checkpoint, and stops.

    Several processes stop after the same step: every tenth they ask each other. A termination
    signal ends them at once, for one that waits in an exchange could not hear it. The second Ctrl-C
    stops at once, and so does the first during the final evaluation. Stands last among the hooks,
    since a step ends with it.
    """

    def __init__(self) -> None:
        # A process that waits for the others in an exchange hears nothing, and is to be ended.
        alone = comm.get_world_size() == 1
        self._signals = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
        self._asked = False
        self._before: dict[int, Any] = {}

    def before_train(self) -> None:
        """Listen, where Python lets us: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self._signals}
            for number in self._signals:
                signal.signal(number, self._note)

    def after_step(self) -> None:
        """
        Stop if it was asked for.

        Raises:
            KeyboardInterrupt: it was; the checkpoint is written.
        """
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if last:
            self._listen_no_more()  # the final checkpoint is there; what is left is to evaluate
        elif self._is_asked():
            _save_now(self.trainer)
            raise KeyboardInterrupt

    def _is_asked(self) -> bool:
        """Return whether this process was asked, or any of several, which all come here."""
        if comm.get_world_size() == 1:
            return self._asked
        if (self.trainer.iter + 1) % _STEPS_BETWEEN_QUESTIONS:
            return False
        device = next(self.trainer.model.parameters()).device
        return sum_over_processes(torch.tensor(float(self._asked), device=device)).item() > 0

    def after_train(self) -> None:
        """Give the signals back."""
        self._listen_no_more()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _logger.warning(
            "%s: stopping after this step%s, with a checkpoint. Once more: at once.",
            signal.Signals(number).name,
            "" if comm.get_world_size() == 1 else f" or one of the next {_STEPS_BETWEEN_QUESTIONS}",
        )

    def _listen_no_more(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _save_now(trainer: Any) -> None:
    """Write the checkpoint of the step under way."""
    trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)


def saved_where_it_fails(trainer: Any, evaluate: Callable[[], Any]) -> Callable[[], Any]:
    """
    Return an evaluation that costs no training: where it fails, a checkpoint is saved first.

    Args:
        trainer: whose hook evaluates, weakly held.
        evaluate: as the hook calls it.
    """
    held = weakref.proxy(trainer)

    def evaluate_or_save() -> Any:
        try:
            return evaluate()
        except Exception:
            if held.iter + 1 < held.max_iter:  # else the final one is there already
                _save_now(held)
            raise

    return evaluate_or_save


def end_with_parent() -> None:
    """
    If the process that started this one asks for it, end when that is gone.

    Its end of the pipe closes whatever ends it, kill -9 included. This process, the leader of a
    group of its own, then gets a termination signal, and after a grace the whole group is killed.
    """
    if os.environ.pop(PARENT_PIPE, None):
        threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)
