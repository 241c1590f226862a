"""What a measurement was made on: hardware and versions, nothing that names a machine or a user."""

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kd_det

_PACKAGES = ("torch", "torchvision", "numpy")


def describe_environment() -> dict[str, Any]:
    """
    Describe the machine and the software for a report.

    Returns:
        Model of the CPU, number of logical cores, number of threads torch uses, name of the first
        GPU (None without one), versions of Python, kd_det, Detectron2, torch, torchvision and
        numpy, and today's date. No host names, no paths.
    """
    import detectron2

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "kd_det": kd_det.__version__,
        "detectron2": detectron2.__version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def shown_command(program: str, argv: Sequence[str]) -> str:
    """Return a command line for a report: absolute paths are cut down to what others can use."""
    return shlex.join([*program.split(), *(without_user_path(word) for word in argv)])


def without_user_path(word: str) -> str:
    """Return a word; an absolute path relative to the working directory, or its last part alone."""
    if not os.path.isabs(word):
        return word
    relative = os.path.relpath(word)
    return os.path.basename(word) if relative.startswith(os.pardir) else relative


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
