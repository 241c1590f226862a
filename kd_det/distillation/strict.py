"""Loading weights of which every tensor must find its place."""

import fnmatch
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from kd_det.reading import load_checkpoint
from kd_det.text import some

_logger = logging.getLogger(__name__)
# Match tensors by the longest common ends of their names.
_SIMILAR_NAMES = "?matching_heuristics=True"
# Buffers that old checkpoints carry and models make themselves.
_HARMLESS = ("pixel_mean", "pixel_std", "*anchor_generator.cell_anchors*", "*num_batches_tracked")


class RecordingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which runs nothing it reads and keeps what did not match."""

    incompatible: Any = None
    _by_similar_names = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; "<path>?matching_heuristics=True" as in Detectron2's main branch."""
        file, query = split_query(path or "")
        self._by_similar_names = bool(query)
        return super().load(file, *args, **kwargs)

    def _load_file(self, filename: str) -> Any:
        content = load_checkpoint(filename)
        if self._by_similar_names:
            content = {**content, "matching_heuristics": True}
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def split_query(path: str) -> tuple[str, str]:
    """Return a checkpoint's path or URL, and the "?matching_heuristics=True" behind it, if any."""
    file = path.removesuffix(_SIMILAR_NAMES)
    return file, path[len(file) :]


def load_strictly(model: nn.Module, weights: str, *, ignore: Sequence[str] = ()) -> str:
    """
    Load weights of which every tensor must find its place, and every place its tensor.

    Args:
        model: the model; do not use it any further if this raises.
        weights: path or URL.
        ignore: fnmatch patterns of keys that may stay unmatched.

    Returns:
        The local path of the file.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message lists them.
    """
    checkpointer = RecordingCheckpointer(model, save_to_disk=False)
    file, query = split_query(weights)
    path = checkpointer.path_manager.get_local_path(file) if "://" in file else file
    try:
        checkpointer.load(path + query, checkpointables=[])
    except Exception as error:
        raise ValueError(
            f"The teacher's weights {weights} could not be read ({type(error).__name__}: {error})."
        ) from error

    def stray(keys: Iterable[str], patterns: Sequence[str] = (*_HARMLESS, *ignore)) -> list[str]:
        return [key for key in keys if not any(fnmatch.fnmatch(key, p) for p in patterns)]

    found = checkpointer.incompatible
    shapes = {key: f"{key}: file {a}, model {b}" for key, a, b in found.incorrect_shapes}
    wanted = stray(model.state_dict(), _HARMLESS)
    matched = len({*wanted} - {*found.missing_keys, *shapes})
    problems = {
        "missing in the file": stray([key for key in found.missing_keys if key not in shapes]),
        "in the file but not in the model": stray(found.unexpected_keys),
        "of another shape": [shapes[key] for key in stray(shapes)],
    }
    if any(problems.values()) or not matched:
        lists = "\n".join(f"  {what} ({len(k)}): {some(k)}" for what, k in problems.items() if k)
        raise ValueError(
            f"The teacher's weights {weights} do not fit the model of its config: {matched} of "
            f"{len(wanted)} tensors matched.\n{lists}\nGive the config the weights were trained "
            "with as KD.TEACHER.CONFIG_FILE, or list harmless keys in KD.TEACHER.IGNORE_KEYS."
        )
    _logger.info("Teacher: %d of %d tensors loaded from %s", matched, len(wanted), weights)
    return path
