"""Damaged checkpoints make room for good ones, and are kept."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from detectron2.utils import comm

from kd_det.reading import what_damages

_logger = logging.getLogger(__name__)


def set_damaged_aside(
    folder: str | os.PathLike[str], damage_of: Callable[[Path], str] = what_damages
) -> list[str]:
    """
    Rename a run's damaged checkpoints, so that it goes on from a good one, or else afresh.

    Called by all processes of a job; the main one renames.

    Args:
        folder: OUTPUT_DIR of the run, which nobody else writes to now.
        damage_of: says what is wrong with a file; "": nothing.

    Returns:
        A sentence for each of them, in the main process.
    """
    told = []
    if comm.is_main_process():
        for file in sorted(Path(folder).glob("model_*.pth")):
            if damage := damage_of(file):
                aside = file.with_name(f"{file.name}.damaged")
                file.replace(aside)
                told.append(f"{file} is damaged ({damage}); it is now {aside.name}.")
    comm.synchronize()
    for sentence in told:
        _logger.warning(sentence)
    return told
