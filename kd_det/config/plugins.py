"""
The door for other people's code: modules that a config names are imported before keys are checked.

Importing a module registers its distillers, detectors, decoders and data sets, with their keys. An
entry "module:function" also calls the function with the config, as Detectron2's projects want it
(`add_pointrend_config(cfg)`). Modules are found as any import is: installed, or on PYTHONPATH.
"""

import importlib
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import CfgNode

AddKeys = Callable[[CfgNode], Any]


def import_plugins(entries: Iterable[str]) -> list[AddKeys]:
    """
    Import the modules that KD.PLUGINS names.

    Args:
        entries: "package.module" or "package.module:add_my_config".

    Returns:
        The functions that add keys to a config, in order.

    Raises:
        ImportError: there is no such module, it fails to import, or it has no such function.
        ValueError: an entry is no text, or the function's name does not say that it adds a config.
    """
    functions = []
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"KD.PLUGINS holds {entry!r}; expected names of Python modules.")
        name, colon, function = entry.partition(":")
        module = _import(name, entry)
        if colon:
            functions.append(_function(module, function, entry))
    return functions


def _import(name: str, entry: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever other people's code raises
        absent = isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name))
        remedy = (
            "install its package, or add the folder that holds it to PYTHONPATH"
            if absent
            else f"importing it failed ({_place(error)})"
        )
        raise ImportError(
            f"KD.PLUGINS: {entry!r} cannot be imported ({type(error).__name__}: {error}); {remedy}."
        ) from error


def _place(error: Exception) -> str:
    """Return where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _function(module: Any, name: str, entry: str) -> AddKeys:
    # A config file must not be able to call just any function of any installed module.
    if not (name.startswith("add_") and name.endswith("_config")):
        raise ValueError(
            f"KD.PLUGINS: {entry!r} names the function {name!r}; expected one that adds keys to a "
            "config, called add_..._config."
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise ImportError(
            f"KD.PLUGINS: {entry!r}: the module has no function {name!r}; expected one that adds "
            "keys to a config."
        )
    return function
