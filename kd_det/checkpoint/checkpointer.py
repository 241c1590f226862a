"""Reading and writing a run's checkpoints."""

import logging
import os
import re
from typing import Any

import torch
from torch import nn

from kd_det.checkpoint.finite import refuse_non_finite
from kd_det.checkpoint.state import KDState, student_of
from kd_det.distillation.strict import RecordingCheckpointer, split_query
from kd_det.files import write_text, write_whole
from kd_det.reading import load_tensors

_logger = logging.getLogger(__name__)


class KDCheckpointer(RecordingCheckpointer):
    """
    Detectron2's checkpointer for the student, with whole files only.

    A file appears under its name when it is complete. A damaged last checkpoint is passed over,
    with a warning, for the newest good one.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(student_of(model), save_dir, kd=KDState(model), **checkpointables)
        self._trained = model
        #: The file that `resume` went on from.
        self.resumed_from = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Write `<name>.pth`, whole or not at all.

        Raises:
            FloatingPointError: the model holds NaN or infinity; nothing is written.
            OSError: the disk is full; the message names the file and the bytes.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        refuse_non_finite(self._trained, f"{name}.pth")
        data = {"model": self.model.state_dict(), **kwargs}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        path = os.path.join(self.save_dir, f"{name}.pth")
        write_whole(path, lambda file: torch.save(data, file))
        _logger.info("Saved checkpoint %s", path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write which checkpoint is the last, whole or not at all."""
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load_student(self, path: str, *, strict: bool) -> None:
        """
        Load the student's weights alone.

        Args:
            path: any checkpoint of kd_det or Detectron2.
            strict: every tensor of the student must be in the file with its shape.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, strict and something is missing, or nothing at all
                matched.
        """
        if "://" not in path and not os.path.isfile(split_query(path)[0]):
            raise FileNotFoundError(f"MODEL.WEIGHTS: {path} does not exist.")
        try:
            self.load(path, checkpointables=[])
        except Exception as error:  # whatever a damaged file raises
            raise ValueError(
                f"MODEL.WEIGHTS: {path} could not be read ({type(error).__name__}: {error}). Give "
                "a complete checkpoint of kd_det or Detectron2."
            ) from error
        missing = list(self.incompatible.missing_keys)
        missing += [key for key, *_ in self.incompatible.incorrect_shapes if key not in missing]
        total = len(self.model.state_dict())
        if (strict and missing) or len(missing) >= total:
            raise ValueError(
                f"MODEL.WEIGHTS: {path} holds {total - len(missing)} of the student's {total} "
                f"tensors; missing or of another shape: {', '.join(missing[:12])}"
                f"{' ...' if len(missing) > 12 else ''}. Give a checkpoint of this architecture."
            )

    def resume(self) -> bool:
        """
        Load the last complete checkpoint of the output folder, with everything beside the model.

        Returns:
            Whether there was one.

        Raises:
            RuntimeError: there are checkpoints, and none is readable.
        """
        path, content = self.last_content()
        if not path:
            return False
        self._restore(path, content)
        self.resumed_from = path
        return True

    def last_readable(self) -> str:
        """
        Return the last checkpoint of the output folder that can be read; "" where there is none.

        Raises:
            RuntimeError: there are checkpoints, and none is readable.
        """
        return self.last_content()[0]

    def last_content(self) -> tuple[str, dict[str, Any]]:
        """Return path and content of `last_readable`; of none, "" and nothing."""
        candidates = self._newest_first()
        for path in candidates:
            try:
                return path, load_tensors(path)
            except Exception as error:  # whatever a damaged file raises
                _logger.warning(
                    "Checkpoint %s is damaged (%s: %s); trying the one before it.",
                    path,
                    type(error).__name__,
                    str(error).split("\n")[0],
                )
        if candidates:
            raise RuntimeError(
                f"None of the checkpoints to resume from is readable: {', '.join(candidates)}. "
                "Remove them and start afresh without --resume."
            )
        return "", {}

    def _restore(self, path: str, checkpoint: dict[str, Any]) -> None:
        absent = [key for key in self.checkpointables if key not in checkpoint]
        if absent:
            raise ValueError(
                f"{path} has no {', '.join(absent)}, so it is no checkpoint of a kd_det run to "
                "resume; start from it with MODEL.WEIGHTS instead."
            )
        self._load_model(checkpoint)
        wrong = [
            *self.incompatible.missing_keys,
            *(k for k, *_ in self.incompatible.incorrect_shapes),
        ]
        if wrong:
            raise ValueError(
                f"{path} does not fit the student ({', '.join(wrong[:8])}); the config changed "
                "since."
            )
        for key, value in self.checkpointables.items():
            value.load_state_dict(checkpoint[key])
        _logger.info("Resumed from %s", path)

    def _newest_first(self) -> list[str]:
        """Return the run's checkpoints, the one tagged as last first, then by iteration."""
        if not os.path.isdir(self.save_dir):
            return []
        files = [f for f in os.listdir(self.save_dir) if re.fullmatch(r"model_(\d+|final)\.pth", f)]
        files.sort(key=lambda f: (f == "model_final.pth", f), reverse=True)
        last = self._tagged()
        if last in files:
            files.remove(last)
        if last:
            files.insert(0, last)
        return [os.path.join(self.save_dir, f) for f in files]

    def _tagged(self) -> str:
        """Return the name of the file that is tagged as the last, if there is such a file."""
        try:
            name = os.path.basename(self.get_checkpoint_file())
        except ValueError:  # the tag is no text
            return ""
        return name if os.path.isfile(os.path.join(self.save_dir, name)) else ""
