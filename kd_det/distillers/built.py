"""What a distiller gets to know of both models when it is built."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class LevelShape(NamedTuple):
    """
    What is known of a pair of levels when the model is built.

    Args:
        name: e.g. "p2~p3".
        stride: pixels of the loaded image per cell.
        channels: C of the teacher's map, which the student's has after its adapter, if any.
    """

    name: str
    stride: float
    channels: int


@dataclass(frozen=True)
class TeacherModule:
    """
    A module of the frozen teacher, to be run on other features than its own.

    Never make it an attribute of a module: optimizer, DDP and checkpoints would take it in.

    Attributes:
        module: in evaluation mode; gradients pass through it and reach none of its parameters.
        autocast: context with the teacher's own precision.
        view_factor: pixels of the loaded image per pixel of the teacher's input.
    """

    module: nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    view_factor: float = 1.0
