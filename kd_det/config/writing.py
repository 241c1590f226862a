"""
The yaml of a distillation, written from what a command line says: what `kd-det distill` leaves.

It is an ordinary config file with a comment beside every key, to be changed and trained like any
other. Paths in it are relative to its own folder, as those of a file that a person wrote.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

import kd_det.zoo as zoo
from kd_det.config.commented import commented_yaml
from kd_det.config.own_data import OwnData
from kd_det.config.reading import load_config
from kd_det.config.roles import is_distillation
from kd_det.distillers import DISTILLER_REGISTRY
from kd_det.files import shipped_root, write_text
from kd_det.text import nearest

FILE_NAME = "distill.yaml"
# What the command has an option of its own for.
_RESERVED = {
    "OUTPUT_DIR": "--out",
    "KD.DISTILLERS": "--method",
    "KD.TEACHER.CONFIG_FILE": "--teacher",
}
_COMMENTS = {
    "_BASE_": "the student's own config; below is what differs from it",
    "MODEL.META_ARCHITECTURE": "the student, with a teacher beside it while it trains",
    "KD.STUDENT.META_ARCHITECTURE": "what the student's config names",
    "KD.TEACHER.CONFIG_FILE": "the config that the teacher was trained with",
    "KD.TEACHER.OPTS": "the absent teacher is trained on the same data",
    "KD.DISTILLERS": "what is compared; several add up; each weighs itself, if it has no WEIGHT",
    "KD.DATASETS": "own data in COCO format",
    "OUTPUT_DIR": "checkpoints (the student's alone), metrics.json, log.txt",
}
_AUTO = "the final checkpoint in the teacher's OUTPUT_DIR; trained first, if absent"


def write_distillation(
    *,
    teacher: str,
    student: str,
    methods: str,
    out: Path,
    data: OwnData | None = None,
    opts: Sequence[str] = (),
    command: str,
) -> Path:
    """
    Write the yaml of a distillation into its output folder, and read it as a run would.

    Args:
        teacher: config file; or the address of a shipped one, "kd_det://<name>".
        student: config file.
        methods: registered names of distillers in any case, comma separated, with labels if need
            be ("ssim,ssim:head").
        out: the run's OUTPUT_DIR.
        data: in place of the data sets that the student's config names; an absent teacher is
            trained on it as well.
        opts: overrides KEY VALUE ...; they become part of the file.
        command: the command line, for whoever reads the file.

    Returns:
        The file. One that says the same already stays as it is.

    Raises:
        FileNotFoundError, KeyError, ValueError, ImportError: an argument, or what `load_config`
            refuses; nothing is left behind.
        FileExistsError: the folder holds another distillation's file.
    """
    flat = _settings(teacher, student, methods, out, data, opts)
    content = _nested(flat)
    file = out / FILE_NAME
    if file.exists():
        if yaml.safe_load(file.read_text(encoding="utf-8")) != content:
            raise FileExistsError(
                f"{file} holds another distillation, or was changed by hand. Train it as it is "
                f"(train_net.py --config-file {shlex.quote(str(file))}), choose another --out, or "
                "remove it."
            )
        load_config(str(file))
        return file
    out.mkdir(parents=True, exist_ok=True)
    header = _header(f"{teacher} teaches {student}", flat["KD.DISTILLERS"], file, command)
    write_text(file, header + commented_yaml(content, _comments(flat)))
    try:
        load_config(str(file))
    except BaseException:
        file.unlink()
        raise
    return file


def resolve_methods(methods: str) -> list[str]:
    """
    Return the entries of KD.DISTILLERS that a list like "ssim,PGD" means.

    Raises:
        KeyError: no distiller has that name in any case; the message lists the nearest ones.
    """
    names = {name.lower(): name for name, _ in DISTILLER_REGISTRY}
    found = []
    for word in methods.split(","):
        name, colon, label = word.strip().partition(":")
        if name.lower() not in names:
            every = ", ".join(sorted(names))
            raise KeyError(
                f"--method: no distiller is called {name!r}; {nearest(name.lower(), names)} "
                f"(all: {every})."
            )
        found.append(f"{names[name.lower()]}{colon}{label}")
    return found


def _settings(
    teacher: str,
    student: str,
    methods: str,
    out: Path,
    data: OwnData | None,
    opts: Sequence[str],
) -> dict[str, Any]:
    """Return the file's values by full key."""
    overrides = _decoded(opts, out)
    plugins = overrides.get("KD.PLUGINS")
    cfg = load_config(student, ["KD.PLUGINS", plugins] if plugins else [])
    distillers = resolve_methods(methods)
    config_file, weights = _teacher_files(teacher)
    own_cfg = load_config(config_file, ["KD.PLUGINS", plugins] if plugins else [])
    plain = cfg.KD.STUDENT if is_distillation(cfg) else cfg.MODEL
    flat: dict[str, Any] = {
        "_BASE_": _path(student, out),
        "MODEL.META_ARCHITECTURE": "DistillationDetector",
        "KD.STUDENT.META_ARCHITECTURE": plain.META_ARCHITECTURE,
        "KD.TEACHER.CONFIG_FILE": _path(config_file, out),
        "KD.TEACHER.WEIGHTS": weights,
        "KD.DISTILLERS": distillers,
    }
    if data is not None:
        absent = not os.path.isfile(os.path.join(own_cfg.OUTPUT_DIR, "model_final.pth"))
        given = overrides.get("KD.TEACHER.WEIGHTS", weights)
        flat |= _data_keys(data, out, with_teacher=given == "auto" and absent)
    return {**flat, "OUTPUT_DIR": str(out), **overrides}


def _teacher_files(teacher: str) -> tuple[str, str]:
    """Return the config file and the weights that --teacher names."""
    if not teacher.startswith(zoo.PREFIX):
        return teacher, "auto"
    entry = zoo.find(teacher)
    here = Path(entry.config)
    return str(here if here.is_file() else shipped_root() / here), entry.address


def _data_keys(data: OwnData, out: Path, *, with_teacher: bool) -> dict[str, Any]:
    train, test = OwnData.NAMES
    keys: dict[str, Any] = {
        "KD.DATASETS": [
            {
                "name": train,
                "json": _path(data.train, out),
                "images": _path(data.train_images, out),
            },
            {"name": test, "json": _path(data.test, out), "images": _path(data.test_images, out)},
        ],
        "DATASETS.TRAIN": [train],
        "DATASETS.TEST": [test],
    }
    if with_teacher:
        folder = str(out / "teacher")
        keys["KD.TEACHER.OPTS"] = [
            "DATASETS.TRAIN", [train], "DATASETS.TEST", [test], "OUTPUT_DIR", folder,
        ]  # fmt: skip
    return keys


def _decoded(opts: Sequence[str], out: Path) -> dict[str, Any]:
    """Return overrides as values by key, read as Detectron2 reads them."""
    if len(opts) % 2:
        raise ValueError(
            "Overrides come in pairs KEY VALUE, but an odd number of words was given: "
            f"{list(opts)}."
        )
    found = {}
    for key, word in zip(opts[0::2], opts[1::2], strict=True):
        if key in _RESERVED:
            raise ValueError(f"{key} cannot be overridden, use {_RESERVED[key]}.")
        value = CfgNode._decode_cfg_value(word)
        if key == "KD.TEACHER.WEIGHTS" and value != "auto" and "://" not in str(value):
            value = _path(str(value), out)
        found[key] = _as_lists(value)
    return found


def _as_lists(value: Any) -> Any:
    """Return a value as yaml reads it back: lists for tuples, inside one another too."""
    return [_as_lists(x) for x in value] if isinstance(value, (list, tuple)) else value


def _path(file: str, folder: Path) -> str:
    """
    Return a path as a file in `folder` names it.

    Relative, where both lie under the working directory with no link in between: such a project can
    be moved as a whole. Absolute elsewhere.
    """
    target, base = Path(os.path.abspath(os.path.expanduser(file))), Path(os.path.abspath(folder))
    together = all(path.is_relative_to(Path.cwd()) for path in (target, base))
    if together and base.resolve() == base:
        return os.path.relpath(target, base)
    return str(target)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise KeyError(f"the command line: no config key is called {key}.")
        node[leaf] = value
    return nested


def _header(subject: str, distillers: Sequence[str], file: Path, command: str) -> str:
    lines = (
        f"{' + '.join(distillers)}: {subject}. Written by",
        f"  {command}",
        "It is an ordinary config: change it, train it, continue it, evaluate its student alone by",
        f"  train_net.py --config-file {shlex.quote(str(file))} [--resume | --eval-only]",
    )
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def _comments(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return what stands beside the keys."""
    auto = {"KD.TEACHER.WEIGHTS": _AUTO} if flat["KD.TEACHER.WEIGHTS"] == "auto" else {}
    return {**_COMMENTS, **auto}
