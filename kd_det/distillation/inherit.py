"""
Starting parts of the student as copies of the teacher's ("inheriting" in PGD, weight copy in MSAD).

It happens once, at a fresh start, after the student's own weights were loaded; never on resume.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn

from kd_det.config import inherits
from kd_det.text import nearest

_logger = logging.getLogger(__name__)


def inheritable_state(teacher: nn.Module) -> dict[str, Tensor]:
    """Return the teacher's tensors under the names a plain student knows them by."""
    # A wrapper whose detector sits deeper says which of its tensors a plain one takes.
    state = getattr(teacher, "inheritable_state", teacher.state_dict)
    return dict(state())


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> list[str]:
    """
    Copy the teacher's tensors into the student where a pattern, the name and the shape match.

    Args:
        student: changed in place.
        teacher: read only.
        patterns: fnmatch patterns of state-dict keys ("head.*"); a plain module path ("head") means
            everything below it.

    Returns:
        The keys that were copied. Every tensor a pattern names is reported in the log, copied or
        not.

    Raises:
        ValueError: a pattern names no tensor of the student, or nothing of it could be copied.
    """
    source, target = inheritable_state(teacher), student.state_dict()
    report: dict[str, str] = {}
    for pattern in patterns:
        keys = [k for k in target if inherits(pattern, k)]
        if not keys:
            raise ValueError(
                f"KD.INHERIT: the pattern {pattern!r} names no tensor of the student; "
                f"{nearest(pattern, [*target, *_modules_of(target)])}."
            )
        outcomes = {key: _copy(key, source, target) for key in keys}
        if "inherited" not in outcomes.values():
            raise ValueError(
                f"KD.INHERIT: no tensor of {pattern!r} could be copied from the teacher:\n"
                + tabulate(outcomes.items(), headers=["tensor", "outcome"])
            )
        report.update(outcomes)
    copied = [key for key, outcome in report.items() if outcome == "inherited"]
    table = tabulate(report.items(), headers=["tensor", "outcome"])
    _logger.info(
        "Inherited %d of %d tensors from the teacher:\n%s", len(copied), len(report), table
    )
    return copied


def _modules_of(keys: Iterable[str]) -> set[str]:
    """Return a pattern for each module that state-dict keys lie in: "head.*", "head.cls.*"."""
    split = [key.split(".") for key in keys]
    return {".".join([*words[:i], "*"]) for words in split for i in range(1, len(words))}


def _copy(key: str, source: dict[str, Tensor], target: dict[str, Tensor]) -> str:
    if key not in source:
        return "kept: the teacher has no such tensor"
    if source[key].shape != target[key].shape:
        return f"kept: {tuple(target[key].shape)} here, {tuple(source[key].shape)} in the teacher"
    target[key].copy_(source[key])
    return "inherited"
