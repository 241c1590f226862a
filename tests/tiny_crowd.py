"""The built-in synthetic crowd, kept in a folder of a test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.data.crowdhuman import register_builtin_crowd

_NAMES = [f"{kind}_{split}" for kind in ("crowdhuman", "crowd_tiny") for split in ("train", "val")]


def _forget() -> None:
    for name in _NAMES:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)


@contextlib.contextmanager
def crowd_kept_in(cache: Path) -> Iterator[None]:
    """Register the crowds anew with another cache; the place is settled at registration."""
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_DET_CACHE", str(cache))
        register_builtin_crowd()
    try:
        yield
    finally:
        _forget()
        register_builtin_crowd()
