"""What a run's outcome depends on beside its config: files and code, as digests, and defaults."""

import functools
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.config import changed_settings
from kd_det.data import register_from_config
from kd_det.data.annotation_file import read_annotation_file
from kd_det.distillers import DISTILLER_REGISTRY, distiller_class, node_name
from kd_det.experiments.digests import digest_of
from kd_det.files import cache_root


def data_identity(cfg: CfgNode) -> dict[str, str]:
    """
    Return digests of the COCO-format sets that a config trains and tests on, by name.

    A digest covers the annotation file's content, and names, sizes and times of its images. Sets
    that kd_det draws itself, always the same, have none; nor has what is not there yet.

    Raises:
        FileNotFoundError, ValueError: from `register_from_config`; or an annotation file is no
            JSON mapping.
    """
    register_from_config(cfg.KD.DATASETS)
    found = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        file = MetadataCatalog.get(name).get("json_file") if name in DatasetCatalog else None
        if not file or not os.path.isfile(file):
            continue
        if Path(file).resolve().is_relative_to(cache_root().resolve()):
            continue
        found[name] = _digest_of_set(Path(file), Path(MetadataCatalog.get(name).image_root))
    return found


def share_identity(cfg: CfgNode) -> dict[str, str]:
    """Return the shares of the distillers that are given none: another default is another run."""
    found = {}
    known = {key for key, _ in DISTILLER_REGISTRY}
    for name in cfg.KD.DISTILLERS:
        if name.partition(":")[0] not in known:
            continue  # refused when the run is rehearsed, by its arm
        node = cfg.KD[node_name(name)]
        if node.WEIGHT is None and node.SHARE is None:
            method = distiller_class(name)
            own = method.share, method.share_of_trained, method.share_of_kin
            found[f"share {name}"] = "/".join(map(str, own))
    return found


def plugin_identity(cfg: CfgNode) -> dict[str, str]:
    """
    Return digests of the modules that KD.PLUGINS names, by entry.

    A digest covers the module's file; of one inside a package, all Python files of that package.
    """
    return {f"plugin {entry}": _digest_of_code(entry) for entry in cfg.KD.PLUGINS}


def model_identity(own_cfg: CfgNode) -> str:
    """Return what a teacher's config says of how its weights are read: a digest."""
    kept = {
        key: value
        for key, value in changed_settings(own_cfg).items()
        if key.startswith(("MODEL.", "KD.STUDENT.")) or key == "INPUT.FORMAT"
    }
    # Its weights are another's to say, and its device no matter.
    for key in ("MODEL.WEIGHTS", "MODEL.DEVICE"):
        kept.pop(key, None)
    return digest_of_values(kept)


def digest_of_values(values: Any) -> str:
    """Return 8 hex digits that follow plain values, whatever the order of mappings."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def ready_made_identity(own_cfg: CfgNode, weights: str) -> str:
    """
    Return what identifies a teacher that brings its weights itself.

    Args:
        own_cfg: its config.
        weights: of KD.TEACHER.WEIGHTS.
    """
    files = weights, own_cfg.MODEL.TIMM.WEIGHTS
    read = " ".join(digest_of(file) if os.path.isfile(file) else file for file in files)
    return hashlib.sha256(f"{own_cfg.MODEL.dump()} {read}".encode()).hexdigest()


def _digest_of_code(entry: str) -> str:
    module = importlib.import_module(entry.partition(":")[0])  # is there: the config was read
    file = Path(str(module.__file__))
    package = sys.modules.get(module.__package__ or "")
    regular = package is not None and getattr(package, "__file__", None)
    files = sorted(file.parent.rglob("*.py")) if regular else [file]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(file.parent)} {digest_of(path)}\n".encode())
    return digest.hexdigest()


def _digest_of_set(file: Path, images: Path) -> str:
    digest = hashlib.sha256(digest_of(file).encode())
    for name in _file_names(str(file), *_stamp(str(file))):
        path = images / name
        digest.update(f"{name} {_stamp(str(path)) if path.is_file() else 'absent'}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)
def _file_names(path: str, size: int, time: int) -> tuple[str, ...]:
    entries = read_annotation_file(Path(path)).get("images")
    entries = entries if isinstance(entries, list) else []
    return tuple(str(e.get("file_name")) for e in entries if isinstance(e, dict))


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
