"""
How a config file is read.

`load_config` is the one way from a yaml file to a config: it refuses keys nobody knows (naming the
nearest valid ones) and resolves the paths a file names against that file's own folder.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from kd_det.config.keys import add_kd_config, add_labelled_nodes
from kd_det.config.plugins import import_plugins
from kd_det.config.roles import is_distillation
from kd_det.config.safe_yaml import parse_yaml
from kd_det.config.values import refuse_wrong_values, takes_float
from kd_det.files import offer_shipped
from kd_det.text import nearest

CN = CfgNode
# Keys that decide which other keys exist: an example of each.
_NAMES = {"PLUGINS": "['my_package.distillers']", "DISTILLERS": "['SSIM', 'PGD'] (KD.SSIM: ...)"}


def load_config(
    config_file: str, opts: Sequence[Any] = (), *, source: str = "the command line"
) -> CfgNode:
    """
    Read a yaml file (and the `_BASE_` files it builds on) and overrides into a full config.

    Args:
        config_file: path of a yaml file.
        opts: overrides as a flat list [KEY, value, KEY, value, ...].
        source: where the overrides are from, for messages.

    Returns:
        The config, not frozen. Relative KD.TEACHER.CONFIG_FILE, KD.TEACHER.WEIGHTS and KD.DATASETS
        paths are made absolute.

    Raises:
        FileNotFoundError: the file, or a `_BASE_`, does not exist.
        ValueError: the file is no yaml mapping, gives one value to a whole group of keys or a
            value of another kind than a key's, or sets distillation keys while
            MODEL.META_ARCHITECTURE is a plain detector.
        KeyError: a key nobody knows; the message lists the nearest valid ones.
        ImportError: what KD.PLUGINS names cannot be imported.
    """
    chain = _read_chain(config_file)
    given = [(path, content.get("KD")) for path, content in chain]
    given.append((source, _given_overrides(opts, source)))
    cfg = _default_config(_all_of(given, "PLUGINS"), _all_of(given, "DISTILLERS"))
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # Detectron2's default, "cuda", would only fail
    for path, content in chain:
        _refuse_unknown_keys(_leaves(content), cfg, path)
        refuse_wrong_values(_leaves(content), _leaves(cfg), path)
        _resolve_paths(content, os.path.dirname(os.path.abspath(path)))
        _read_whole_numbers(content, cfg)
        cfg.merge_from_other_cfg(CN(content))
    _apply_overrides(cfg, opts, source)
    _refuse_idle_settings(cfg, config_file)
    _refuse_twins(cfg, config_file)
    return cfg


def _default_config(plugins: Iterable[str], distillers: Iterable[str]) -> CfgNode:
    """Return all keys with their defaults, those of plugins and of labelled distillers included."""
    functions = import_plugins(dict.fromkeys(plugins))
    cfg = get_cfg()
    add_kd_config(cfg)
    for add_keys in functions:
        add_keys(cfg)
    add_labelled_nodes(cfg, dict.fromkeys(distillers))
    return cfg


def _all_of(given: Sequence[tuple[str, Any]], key: str) -> list[str]:
    """Return what any of several KD nodes lists; what is no list is refused when it is merged."""
    out = []
    for source, kd in given:
        entries = kd.get(key) if isinstance(kd, Mapping) else None
        for entry in entries if isinstance(entries, list | tuple) else []:
            if not isinstance(entry, str):
                raise ValueError(
                    f"{source}: KD.{key} holds {entry!r}; expected names alone, as {_NAMES[key]}."
                )
            out.append(entry)
    return out


def _given_overrides(opts: Sequence[Any], source: str) -> dict[str, Any]:
    """Return KD.PLUGINS and KD.DISTILLERS as overrides give them: they decide which keys exist."""
    out = {}
    for key, value in zip(opts[0::2], opts[1::2], strict=False):
        name = str(key).removeprefix("KD.")
        if key != name and name in _NAMES:
            try:
                out[name] = yaml.safe_load(value) if isinstance(value, str) else value
            except yaml.YAMLError as error:
                raise ValueError(
                    f"{source}: {key} is {value!r}, expected a list of names, as {_NAMES[name]}."
                ) from error
    return out


def _refuse_twins(cfg: CfgNode, config_file: str) -> None:
    """Refuse a distiller that is active twice under one name: only one of them would be heard."""
    names = list(cfg.KD.DISTILLERS)
    for name in {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"{config_file}: KD.DISTILLERS names {name!r} twice; give the second one a label, "
            f"'{name}:second', and keys of its own."
        )


def _refuse_idle_settings(cfg: CfgNode, config_file: str) -> None:
    """Refuse distillation settings in a config that distils nothing."""
    idle = [key for key in ("DISTILLERS", "INHERIT") if cfg.KD[key]]
    idle += ["STUDENT.VIEW_FACTOR"] if cfg.KD.STUDENT.VIEW_FACTOR != 1 else []
    if idle and not is_distillation(cfg):
        name = cfg.MODEL.META_ARCHITECTURE
        raise ValueError(
            f"{config_file}: KD.{' and KD.'.join(idle)} would have no effect, because "
            f"MODEL.META_ARCHITECTURE is {name}. Set it to DistillationDetector, and "
            f"KD.STUDENT.META_ARCHITECTURE to {name}."
        )


def _apply_overrides(cfg: CfgNode, opts: Sequence[Any], source: str) -> None:
    """Merge [KEY, value, ...] into cfg; relative paths in it mean the working directory."""
    if len(opts) % 2:
        raise ValueError(
            f"{source}: Overrides come in pairs KEY VALUE, but an odd number of words was given: "
            f"{list(opts)}."
        )
    keys = list(opts[0::2])
    _refuse_unknown_keys(keys, cfg, source)
    now = _leaves(cfg)
    for pair in zip(keys, opts[1::2], strict=True):
        refuse_wrong_values(dict([pair]), now, source)
    # yacs would refuse a whole number where a float stands; None is no number (a WEIGHT not given).
    floats = {key for key, value in now.items() if takes_float(key, value)}
    words = [
        float(v) if k in floats and v not in (None, "None") else v
        for k, v in zip(keys, opts[1::2], strict=True)
    ]
    cfg.merge_from_list([word for pair in zip(keys, words, strict=True) for word in pair])
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if f"KD.TEACHER.{key}" in keys:
            cfg.KD.TEACHER[key] = _resolve(cfg.KD.TEACHER[key], os.getcwd())


def changed_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings, by full key, in which a config differs from all defaults."""
    before, now = _leaves(_default_config(cfg.KD.PLUGINS, cfg.KD.DISTILLERS)), _leaves(cfg)
    return {key: value for key, value in now.items() if key not in before or before[key] != value}


def _read_chain(config_file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, content without `_BASE_`) from the root base file down to `config_file`."""
    chain: list[tuple[str, dict[str, Any]]] = []
    path = config_file
    while path:
        content = _read_yaml(path, f", the _BASE_ of {chain[0][0]}" if chain else "")
        if any(os.path.samefile(path, seen) for seen, _ in chain):
            raise ValueError(f"{config_file}: its _BASE_ files form a circle through {path}.")
        base = content.pop("_BASE_", "")
        if not isinstance(base, str):
            raise ValueError(f"{path}: _BASE_ is {base!r}, expected the path of one yaml file.")
        chain.insert(0, (path, content))
        path = os.path.join(os.path.dirname(path), os.path.expanduser(base)) if base else ""
    return chain


def _read_yaml(path: str, role: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Config file {path} does not exist (working directory {os.getcwd()}){role}."
            f"{offer_shipped(path)}"
        )
    if path.endswith(".py"):
        raise ValueError(
            f"{path} is a LazyConfig, and a yaml file is expected here. A run takes one as "
            "--config-file or as KD.TEACHER.CONFIG_FILE (docs/lazyconfig.md); _BASE_ and kd-det "
            "compare do not."
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(), path)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is not a yaml config file ({type(error).__name__}{_place(error)}). If it is a "
            "checkpoint, give it as ...WEIGHTS and the yaml it was trained with as the config file."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a yaml mapping of keys.")
    return content


def _place(error: Exception) -> str:
    """Return what an error of yaml's syntax says, and the line, if it knows one."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}: {getattr(error, 'problem', '')}"


def _read_whole_numbers(content: dict[str, Any], cfg: Mapping[str, Any], prefix: str = "") -> None:
    """Turn whole numbers into floats where a key takes a float: yacs would refuse them."""
    for key, value in content.items():
        if isinstance(value, dict):
            _read_whole_numbers(value, cfg[key], f"{prefix}{key}.")
        elif type(value) is int and takes_float(f"{prefix}{key}", cfg[key]):
            content[key] = float(value)


def _leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by full key."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(_leaves(value, f"{name}."))
        else:
            out[name] = value
    return out


def _refuse_unknown_keys(keys: Iterable[str], cfg: CfgNode, source: str) -> None:
    valid = set(_leaves(cfg))
    nodes = {name.rsplit(".", i)[0] for name in valid for i in range(1, name.count(".") + 1)}
    for key in keys:
        if key in nodes:
            raise ValueError(
                f"{source}: {key} is a group of keys, expected values for single ones."
            )
        if key not in valid:
            raise KeyError(f"{source}: no config key is called {key}; {nearest(key, valid)}.")


def _resolve(path: Any, folder: str) -> Any:
    """Make a path absolute: against `folder` if it exists there, else the working directory."""
    if not isinstance(path, str) or not path or path == "auto" or "://" in path:
        return path
    path = os.path.expandvars(os.path.expanduser(path))
    beside = os.path.normpath(os.path.join(folder, path))
    return beside if os.path.exists(beside) else os.path.abspath(path)


def _resolve_paths(content: dict[str, Any], folder: str) -> None:
    kd = content.get("KD") or {}
    teacher = kd.get("TEACHER") or {}
    for key in ("CONFIG_FILE", "WEIGHTS"):
        if key in teacher:
            teacher[key] = _resolve(teacher[key], folder)
    for item in kd.get("DATASETS") or []:
        for key in ("json", "images"):
            if isinstance(item, dict) and key in item:
                item[key] = _resolve(item[key], folder)
