"""Addresses of shipped teachers in Detectron2's PathManager, beside its own `detectron2://`."""

from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from kd_det.zoo.index import PREFIX, checked_path


class ZooHandler(PathHandler):
    """Resolves "kd_det://<name>" to the file in the package, checked; reading only."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(checked_path(path))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        try:
            self._get_local_path(path)
        except FileNotFoundError:
            return False
        return True

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise ValueError(f"{path} ships with kd_det and is not written to (mode {mode!r}).")
        return open(self._get_local_path(path), mode, buffering)


def register_handler() -> None:
    """Make Detectron2's PathManager resolve the zoo's addresses. Safe to call again."""
    PathManager.register_handler(ZooHandler(), allow_override=True)
