"""
Detectron2's LazyConfig files. Such a file is Python, and reading it runs it.

Only a file that the user names is read so: on the command line, as a teacher's config, or by one of
these (a relative import in it). What a checkpoint holds never leads to one.
"""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig


def is_lazy(config_file: str) -> bool:
    """Return whether a config file is a LazyConfig, by its ending."""
    return config_file.endswith(".py")


def load_lazy(config_file: str, overrides: Sequence[str] = ()) -> Any:
    """
    Run a LazyConfig file and return what it configures.

    Args:
        config_file: path of a Python file.
        overrides: "path.key=value", as Detectron2's tools/lazyconfig_train_net.py takes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no `model`, or an override is none.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"Config file {config_file} does not exist (working directory {os.getcwd()})."
        )
    wrong = [word for word in overrides if "=" not in str(word)]
    if wrong:
        raise ValueError(
            f"{config_file} is a LazyConfig, whose overrides are written path.key=value; found "
            f"{wrong}."
        )
    lazy = LazyConfig.load(config_file)
    if "model" not in lazy:
        raise ValueError(f"{config_file} has no `model`, which Detectron2's LazyConfigs have.")
    return LazyConfig.apply_overrides(lazy, [str(word) for word in overrides])
