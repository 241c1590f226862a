"""
Capturing the outputs of named modules during one forward pass.

Hooks are attached for the duration of one pass and removed after it, so a model that is evaluated,
copied or exported carries none. Outputs are kept by reference, never cloned; a later in-place
change of a captured tensor is detected and stops the run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_det.text import nearest


class StopForward(Exception):
    """Raised inside a forward pass once everything wanted from it has been captured."""


@dataclass(frozen=True)
class CapturePath:
    """
    A module path with an optional call number.

    Attributes:
        module: dotted path, e.g. "head.cls_subnet.0"; "" is the model itself.
        call: which call of the module is meant, 0 the first; None for all of them.
    """

    module: str
    call: int | None = None

    @classmethod
    def parse(cls, text: str, model: nn.Module) -> "CapturePath":
        """
        Read "path", "path@2" (its third call), "path#0" (the first ReLU inside it) or "path^0"
        (what enters that ReLU: the output of the convolution or norm before it).

        Raises:
            ValueError: what follows a sign is no number, there are not so many ReLUs, or nothing
                stands before that one.
        """
        path, at, call = text.partition("@")
        mark = "^" if "^" in path else "#"
        module, mark, block = path.partition(mark)
        for sign, number in ((at, call), (mark, block)):
            if sign and not number.isdigit():
                raise ValueError(f"Capture {text!r}: expected a number after {sign!r}.")
        if mark:
            module = _activation(model, module, int(block), mark)
        if mark == "^":
            module = _before(model, module)
        return cls(module, int(call) if at else None)

    def expect_in(self, model: nn.Module) -> None:
        """Raise ValueError, with the nearest names, where a model has no such module."""
        modules = dict(model.named_modules())
        if self.module not in modules:
            pyramid = " A detector's pyramid is 'backbone'." if "backbone" in modules else ""
            raise ValueError(
                f"{type(model).__name__} has no module '{self.module}' to capture; "
                f"{nearest(self.module, filter(None, modules))}.{pyramid}"
            )


class Captures:
    """Outputs of one pass by module path, one entry per call."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[Any]] = {}
        self._versions: dict[str, list[list[tuple[Tensor, int]]]] = {}
        self.order: list[str] = []

    def add(self, module: str, output: Any) -> None:
        """Keep one output."""
        self._outputs.setdefault(module, []).append(output)
        versions = [(tensor, tensor._version) for tensor in tensors_of(output)]
        self._versions.setdefault(module, []).append(versions)
        self.order.append(module)

    def get(self, path: CapturePath, *, changed: bool = False) -> list[Any]:
        """
        Return what was captured, one entry per call (a single entry if the path names a call).

        Args:
            path: of the module.
            changed: tensors that were changed since will do: only shapes are read.

        Raises:
            RuntimeError: nothing was captured, or a captured tensor was changed in place since.
        """
        calls = self._outputs.get(path.module, [])
        if not calls or (path.call is not None and path.call >= len(calls)):
            wanted = "" if path.call is None else f" call {path.call} of"
            raise RuntimeError(
                f"Capture: wanted{wanted} module '{path.module}', but it was called {len(calls)} "
                "times in this forward pass; capture a module that this model runs."
            )
        chosen = slice(None) if path.call is None else slice(path.call, path.call + 1)
        for versions in self._versions[path.module][chosen]:
            if not changed and any(t._version != version for t, version in versions):
                raise RuntimeError(
                    f"Capture: the output of '{path.module}' was modified in place later in the "
                    "forward pass; capture the module that makes the modification (e.g. the "
                    "activation)."
                )
        return calls[chosen]


class FeatureCapture:
    """
    Captures outputs of a model's modules.

    Args:
        model: the model whose forward passes are observed.
        paths: what to capture.

    Raises:
        ValueError: a path names no module; the message lists the nearest ones.
    """

    def __init__(self, model: nn.Module, paths: Iterable[CapturePath]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        modules = dict(model.named_modules())
        for path in self.paths:
            path.expect_in(model)
        self._modules = {path.module: modules[path.module] for path in self.paths}

    @contextlib.contextmanager
    def record(self, stop_after: int | None = None) -> Iterator[Captures]:
        """
        Capture during the context.

        Args:
            stop_after: raise `StopForward` from the hook after this many captures of any kind; it
                ends the context silently.

        Yields:
            The captures, filled while the model runs; still readable after the context.
        """
        captures = Captures()
        handles: list[RemovableHandle] = []
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(_hook(name, captures, stop_after)))
            yield captures
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def count_needed(self, order: list[str]) -> int:
        """
        Return how many captures a pass needs before everything wanted has been seen.

        Args:
            order: module paths in the order in which a full pass fired them (`Captures.order`).

        Raises:
            RuntimeError: a wanted module did not fire, or not often enough.
        """
        last = 0
        for path in self.paths:
            fired = [i for i, name in enumerate(order) if name == path.module]
            if not fired or (path.call is not None and path.call >= len(fired)):
                raise RuntimeError(
                    f"Capture: module '{path.module}' runs {len(fired)} times in a forward pass of "
                    "the model in evaluation mode; wanted "
                    f"{'it' if path.call is None else path.call}."
                )
            last = max(last, fired[-1 if path.call is None else path.call] + 1)
        return last


def _activation(model: nn.Module, parent: str, index: int, mark: str) -> str:
    """Return the path of the index-th ReLU inside a module: the end of a convolution block."""
    modules = dict(model.named_modules())
    if parent not in modules:
        raise ValueError(
            f"{type(model).__name__} has no module '{parent}'; "
            f"{nearest(parent, filter(None, modules))}."
        )
    found = [
        f"{parent}.{name}".strip(".")
        for name, module in modules[parent].named_modules()
        if isinstance(module, nn.ReLU)
    ]
    if index >= len(found):
        raise ValueError(
            f"Capture '{parent}{mark}{index}': the module has {len(found)} ReLU activations; "
            "the index counts from 0."
        )
    return found[index]


def _before(model: nn.Module, path: str) -> str:
    """Return the path of the module before another in the same Sequential."""
    parent, _, name = path.rpartition(".")
    siblings = list(dict(model.get_submodule(parent).named_children()))
    place = siblings.index(name)
    if place == 0 or not isinstance(model.get_submodule(parent), nn.Sequential):
        raise ValueError(
            f"Capture: '{path}' is not preceded by a layer in a Sequential, so what enters it has "
            "no module of its own; capture another place."
        )
    return f"{parent}.{siblings[place - 1]}"


def _hook(name: str, captures: Captures, stop_after: int | None) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        captures.add(name, output)
        if stop_after is not None and len(captures.order) >= stop_after:
            raise StopForward

    return hook


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []
