"""
The recipe of `kd-det compare`: which arms are trained, with which seeds, and what is compared.

    name: quickstart
    teacher: teacher.yaml            # trained first, unless it is there already
    baseline: none                   # the arm all others are compared with
    seeds: [0, 1]                    # optional, default [0]
    overrides: [SOLVER.MAX_ITER, 90] # optional, of every run, the teacher's included
    comparisons: [[b, a]]            # optional, further paired differences (first minus second)
    arms:
      - {name: none, config: student.yaml}
      - {name: a, config: feature_lp.yaml, overrides: [KD.FEATURE_LP.P, 2], label: "L2 on features"}
      - {name: b, config: student.yaml, init_from: none}   # starts from that arm's final checkpoint

An arm without iterations (SOLVER.MAX_ITER 0) is not trained but evaluated as `init_from` left it.
Config files are relative to the recipe.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kd_det.config.safe_yaml import RefusedYamlError, parse_yaml
from kd_det.files import offer_shipped
from kd_det.text import nearest

_RECIPE_KEYS = ("name", "teacher", "baseline", "seeds", "overrides", "comparisons", "arms")
_ARM_KEYS = ("name", "config", "overrides", "label", "init_from")
# Overrides that `kd-det compare` sets itself for every run, and what to use instead.
_RESERVED = {"SEED": "the recipe's `seeds`", "OUTPUT_DIR": "--out"}
# Overrides that name files: relative to the recipe when they exist there.
_PATH_KEYS = ("KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS", "MODEL.WEIGHTS")


class RecipeError(ValueError):
    """A recipe, or what the command line asks of it, that cannot be carried out."""


@dataclass(frozen=True)
class Arm:
    """One way of training the student."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    label: str
    # Arm whose final checkpoint of the same seed this arm starts from.
    init_from: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; every path is absolute."""

    name: str
    teacher: Path
    baseline: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    # (a, b): the paired difference a - b is reported as well.
    comparisons: tuple[tuple[str, str], ...]
    # Arms of the file that are not to run.
    left_out: tuple[Arm, ...] = ()

    def arm(self, name: str) -> Arm:
        """Return the arm of that name, which must exist."""
        return next(arm for arm in self.arms if arm.name == name)

    def select(self, names: Iterable[str]) -> "Recipe":
        """
        Return the recipe cut down to some arms, the baseline, and the arms these start from.

        Raises:
            RecipeError: no arm has that name.
        """
        wanted = [self.baseline, *names]
        for name in wanted:
            _check_arm(name, [arm.name for arm in self.arms], "--arms")
        for name in wanted:  # grows while it is read: ancestors have ancestors
            parent = self.arm(name).init_from
            if parent and parent not in wanted:
                wanted.append(parent)
        pairs = tuple(pair for pair in self.comparisons if set(pair) <= set(wanted))
        arms = tuple(arm for arm in self.arms if arm.name in wanted)
        left_out = tuple(arm for arm in self.arms if arm.name not in wanted)
        return replace(self, arms=arms, comparisons=pairs, left_out=left_out)

    def with_seeds(self, seeds: Iterable[int]) -> "Recipe":
        """
        Return the recipe with other seeds.

        Raises:
            RecipeError: they are no distinct non-negative integers.
        """
        return replace(self, seeds=_seeds(list(seeds), "--seeds"))


def read_recipe(path: str) -> Recipe:
    """
    Read and check a recipe.

    Args:
        path: a yaml file with the keys shown on top of this module.

    Raises:
        RecipeError: the file, or a config it names, does not exist; a key is unknown or missing, or
            holds something else than it should; the message says what to change.
    """
    file = Path(path).absolute()
    content = _read_yaml(file)
    where = str(path)
    _check_keys(content, _RECIPE_KEYS, ("teacher", "baseline", "arms"), where)
    if not isinstance(content["arms"], list) or not content["arms"]:
        raise RecipeError(f"{where}: `arms` must be a list with at least one arm.")
    arms = tuple(_read_arm(item, i, file, where) for i, item in enumerate(content["arms"]))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: {names.count(name)} arms are called {name}; rename them.")
    _check_arm(content["baseline"], names, f"{where}: baseline")
    _check_ancestry(arms, where)
    return Recipe(
        name=str(content.get("name", file.stem)),
        teacher=_config_path(content["teacher"], file, f"{where}: teacher"),
        baseline=content["baseline"],
        seeds=_seeds(content.get("seeds", [0]), f"{where}: seeds"),
        overrides=_overrides(content.get("overrides", []), file, where),
        arms=arms,
        comparisons=_comparisons(content.get("comparisons", []), names, where),
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RecipeError(f"Recipe {file} does not exist.{offer_shipped(file)}")
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except RefusedYamlError as error:
        raise RecipeError(f"Recipe {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"Recipe {file} is not a yaml file: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"Recipe {file} holds {type(content).__name__}, expected a mapping.")
    return content


def _check_keys(
    content: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...], where: str
) -> None:
    for key in content:
        if key not in known:
            hint = nearest(str(key), known)
            raise RecipeError(f"{where}: unknown key {key}; {hint} (all: {', '.join(known)}).")
    for key in required:
        if key not in content:
            raise RecipeError(f"{where}: the key `{key}` is missing.")


def _read_arm(item: Any, index: int, file: Path, where: str) -> Arm:
    where = f"{where}: arms[{index}]"
    if not isinstance(item, dict):
        raise RecipeError(f"{where} is {item!r}, expected a mapping like {{name:, config:}}.")
    _check_keys(item, _ARM_KEYS, ("name", "config"), where)
    name = item["name"]
    # Names become folder names.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise RecipeError(
            f"{where}: name {name!r} must be a word of letters, digits and any of _ . + - "
            "(put what readers should see in `label`)."
        )
    where = f"{where} ({name})"
    return Arm(
        name=name,
        config=_config_path(item["config"], file, f"{where}: config"),
        overrides=_overrides(item.get("overrides", []), file, where),
        label=str(item.get("label", name)),
        init_from=item.get("init_from"),
    )


def _config_path(value: Any, file: Path, where: str) -> Path:
    path = (file.parent / str(value)).resolve()
    if not path.is_file():
        raise RecipeError(f"{where} names {value}, but there is no file {path}.")
    return path


def _overrides(value: Any, file: Path, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) % 2:
        raise RecipeError(f"{where}: overrides must be a list [KEY, value, ...], found {value!r}.")
    words = [str(word) for word in value]
    for i in range(0, len(words), 2):
        if words[i] in _RESERVED:
            raise RecipeError(
                f"{where}: {words[i]} cannot be overridden, use {_RESERVED[words[i]]}."
            )
        if words[i] in _PATH_KEYS and (file.parent / words[i + 1]).is_file():
            words[i + 1] = str((file.parent / words[i + 1]).resolve())
    return tuple(words)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value)
    if not good or len(set(value)) != len(value):
        raise RecipeError(f"{where} must be distinct integers >= 0, found {value!r}.")
    return tuple(value)


def _check_arm(name: Any, names: list[str], where: str) -> None:
    if name not in names:
        raise RecipeError(f"{where}: no arm is called {name}; {nearest(str(name), names)}.")


def _check_ancestry(arms: tuple[Arm, ...], where: str) -> None:
    parents = {arm.name: arm.init_from for arm in arms}
    for arm in arms:
        seen = [arm.name]
        parent = arm.init_from
        while parent is not None:
            _check_arm(parent, list(parents), f"{where}: init_from of {seen[-1]}")
            if parent in seen:
                raise RecipeError(f"{where}: init_from goes in a circle: {seen}.")
            seen.append(parent)
            parent = parents[parent]


def _comparisons(value: Any, names: list[str], where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise RecipeError(f"{where}: comparisons must be a list of pairs [a, b], found {value!r}.")
    for name in (name for pair in value for name in pair):
        _check_arm(name, names, f"{where}: comparisons")
    # Each counts once where many comparisons are corrected for.
    unordered = [frozenset(pair) for pair in value]
    for pair, both in zip(value, unordered, strict=True):
        if len(both) < 2 or unordered.count(both) > 1:
            what = "given twice" if len(both) > 1 else "of an arm with itself"
            raise RecipeError(f"{where}: comparisons has the pair {pair}, {what}; take it out.")
    return tuple((a, b) for a, b in value)
