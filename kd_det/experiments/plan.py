"""
From a recipe to the training runs it needs: their folders, their order, their command lines.

A run's folder carries a hash of everything that decides its outcome: the resolved config, digests
of its data sets, the identity of the teacher and of the checkpoint it starts from, the shares that
its methods would take, the code of its plugins, and kd_det's version. So a finished run is
recognised, and a changed config, annotation or image gets a new folder instead of an old result.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

import kd_det
from kd_det import zoo
from kd_det.config import changed_settings, load_config, needs_teacher
from kd_det.distillation.ready_made import is_ready_made
from kd_det.experiments.digests import digest_of
from kd_det.experiments.identity import (
    data_identity,
    digest_of_values,
    model_identity,
    plugin_identity,
    ready_made_identity,
    share_identity,
)
from kd_det.experiments.recipe import Arm, Recipe, RecipeError


@dataclass(frozen=True)
class Run:
    """One training run; without iterations, or of a teacher with given weights, an evaluation."""

    # The arm's name, or the teacher's.
    name: str
    seed: int
    folder: Path
    config_file: Path
    # All overrides, KEY VALUE ..., OUTPUT_DIR and SEED included.
    opts: tuple[str, ...]
    # 0: an evaluation.
    iterations: int
    # Runs whose final checkpoints this one reads.
    needs: tuple["Run", ...] = ()
    is_teacher: bool = False

    @property
    def title(self) -> str:
        """Name for humans."""
        if self.is_teacher:
            return "teacher" if self.name == "teacher" else f"teacher {self.name}"
        return f"{self.name} seed {self.seed}"

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint the run writes."""
        return self.folder / "model_final.pth"

    def arguments(self) -> list[str]:
        """Return the command line after the program's name."""
        flags = [] if self.iterations else ["--eval-only"]
        if (self.folder / "last_checkpoint").exists() or any(self.folder.glob("model_*.pth")):
            flags.append("--resume")
        return ["--config-file", str(self.config_file), *flags, *self.opts]


@dataclass(frozen=True)
class Plan:
    """All runs of a recipe; `runs` is in an order in which every run follows what it needs."""

    runs: tuple[Run, ...]
    teacher: Run
    # (arm, seed) -> run.
    students: dict[tuple[str, int], Run]
    # The config of the baseline, for what concerns the test set.
    baseline_cfg: CfgNode

    @property
    def teachers(self) -> list[Run]:
        """The runs of teachers, the recipe's own first."""
        others = [run for run in self.runs if run.is_teacher and run is not self.teacher]
        return [self.teacher, *others]


def make_plan(recipe: Recipe, out: Path) -> Plan:
    """
    Load every config of a recipe and lay out its runs.

    Args:
        recipe: what to train.
        out: folder of the whole comparison.

    Raises:
        RecipeError: runs are evaluated on different test sets, or on none or several.
        FileNotFoundError, KeyError, ValueError: from `load_config`.
    """
    return _Planner(recipe, out.absolute()).plan()


class _Planner:
    """Builds runs on demand, each once."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self.runs: dict[Path, Run] = {}
        self.test_sets: dict[str, tuple[str, ...]] = {}
        self._configs: dict[tuple[Path, tuple[str, ...]], CfgNode] = {}

    def plan(self) -> Plan:
        recipe = self.recipe
        students = {
            (arm.name, seed): self._student(arm, seed)
            for seed in recipe.seeds
            for arm in recipe.arms
        }
        teacher = self._recipe_teacher()
        self._check_test_sets()
        # A stable sort: what a run needs was built before it, and no teacher needs a student.
        ordered = sorted(self.runs.values(), key=lambda run: not run.is_teacher)
        base = recipe.arm(recipe.baseline)
        cfg = self._arm_config(base)
        return Plan(tuple(ordered), teacher, students, cfg)

    def _config(self, file: Path, opts: tuple[str, ...], source: str) -> CfgNode:
        """Return a config, read once with the same overrides; `source` says whose they are."""
        if (file, opts) not in self._configs:
            source = f"recipe {self.recipe.name}, {source}"
            self._configs[file, opts] = load_config(str(file), opts, source=source)
        return self._configs[file, opts].clone()

    def _arm_config(self, arm: Arm) -> CfgNode:
        opts = (*self.recipe.overrides, *arm.overrides)
        return self._config(arm.config, opts, f"its overrides and those of arm {arm.name}")

    def _identity(self, weights: str, owner: str) -> str:
        """Return the sha256 of a checkpoint, a file or of the zoo; of another URL, itself."""
        if weights.startswith(zoo.PREFIX):
            return zoo.find(weights).sha256
        if "://" in weights:
            return weights
        if not Path(weights).is_file():
            raise RecipeError(
                f"Teacher weights {weights} do not exist (KD.TEACHER.WEIGHTS of {owner})."
            )
        return digest_of(weights)

    def _student(self, arm: Arm, seed: int) -> Run:
        parent = self._student(self.recipe.arm(arm.init_from), seed) if arm.init_from else None
        opts = (*self.recipe.overrides, *arm.overrides)
        return self._add(arm.name, self._arm_config(arm), arm.config, opts, seed, parent=parent)

    def _recipe_teacher(self) -> Run:
        """Return the run of the recipe's teacher: the arms' one, where an arm names that config."""
        config = self.recipe.teacher
        for run in list(self.runs.values()):
            if run.is_teacher and run.config_file == config:
                return run
        # An arm that is left out may know where its weights are, which spares its training.
        for arm in self.recipe.left_out:
            cfg = self._arm_config(arm)
            if needs_teacher(cfg) and Path(cfg.KD.TEACHER.CONFIG_FILE).resolve() == config:
                return self._teacher_of(cfg, f"arm {arm.name}")[0]
        if is_ready_made(self._config(config, (), "teacher")):
            raise RecipeError(
                f"{self.recipe.name}: the teacher {config.name} is no detector, so there is no AP "
                "to measure students by. Let `teacher` name a detector; arms may learn from others."
            )
        return self._teacher(config, (), "auto", "its overrides for the teacher")

    def _teacher(self, config: Path, opts: tuple[str, ...], weights: str, source: str) -> Run:
        opts = (*self.recipe.overrides, *opts)
        cfg = self._config(config, opts, source)
        return self._add(config.stem, cfg, config, opts, None, weights=weights)

    def _add(
        self,
        name: str,
        cfg: CfgNode,
        config: Path,
        opts: tuple[str, ...],
        seed: int | None,
        parent: Run | None = None,
        weights: str = "auto",
    ) -> Run:
        """Make the run of a student (`seed` given) or of a teacher, and those that it needs."""
        is_teacher = seed is None
        owner = f"teacher {name}" if is_teacher else f"arm {name}"
        # A teacher whose config leaves the seed open gets one, so that its run can be repeated.
        cfg.SEED = max(cfg.SEED, 0) if seed is None else seed
        settings = ["SEED", str(cfg.SEED)]
        needs = []
        identities = {
            "version": kd_det.__version__,
            **self._files_of(cfg, parent),
            **share_identity(cfg),
            **plugin_identity(cfg),
        }
        if weights != "auto":
            settings += ["MODEL.WEIGHTS", weights]
            identities["weights"] = self._identity(weights, owner)
        elif needs_teacher(cfg) and (own_cfg := self._ready_made(cfg, owner)):
            identities["teacher"] = ready_made_identity(own_cfg, cfg.KD.TEACHER.WEIGHTS)
        elif needs_teacher(cfg):
            teacher, path, identities["teacher"] = self._teacher_of(cfg, owner)
            # The student's process builds it from its config, as it was trained.
            own_opts = [*self.recipe.overrides, *map(str, cfg.KD.TEACHER.OPTS)]
            settings += ["KD.TEACHER.WEIGHTS", path, "KD.TEACHER.OPTS", repr(own_opts)]
            needs.append(teacher)
        if parent is not None:
            settings += ["MODEL.WEIGHTS", str(parent.checkpoint)]
            identities["init"] = parent.folder.name
            needs.append(parent)
        stem = f"teachers/{name}" if is_teacher else f"runs/{name}-seed{cfg.SEED}"
        folder = self.out / f"{stem}-{_hash(cfg, identities)}"
        if folder not in self.runs:
            self.test_sets[f"{config.name} ({name})"] = tuple(cfg.DATASETS.TEST)
            self.runs[folder] = Run(
                name=name,
                seed=cfg.SEED,
                folder=folder,
                config_file=config,
                opts=(*opts, *settings, "OUTPUT_DIR", str(folder)),
                iterations=cfg.SOLVER.MAX_ITER if weights == "auto" else 0,
                needs=tuple(needs),
                is_teacher=is_teacher,
            )
        return self.runs[folder]

    def _files_of(self, cfg: CfgNode, parent: Run | None) -> dict[str, str]:
        """Return digests of what a run reads: its data sets, and the file that it starts from."""
        found = {f"data {name}": digest for name, digest in data_identity(cfg).items()}
        if parent is None and os.path.isfile(cfg.MODEL.WEIGHTS):
            found["start"] = digest_of(cfg.MODEL.WEIGHTS)
        return found

    def _ready_made(self, cfg: CfgNode, owner: str) -> CfgNode | None:
        """Return the config of the teacher a config names, if it brings its weights itself."""
        node = cfg.KD.TEACHER
        if not node.CONFIG_FILE:
            return None
        opts = tuple(str(word) for word in node.OPTS)
        source = f"KD.TEACHER.OPTS of {owner}"
        own_cfg = self._config(Path(node.CONFIG_FILE).resolve(), opts, source)
        return own_cfg if is_ready_made(own_cfg) else None

    def _teacher_of(self, cfg: CfgNode, owner: str) -> tuple[Run, str, str]:
        """Return the run of the teacher a config names, its checkpoint, and its identity."""
        node = cfg.KD.TEACHER
        if not node.CONFIG_FILE:
            raise RecipeError(
                f"{owner}: distills or inherits, but its config names no teacher; set "
                "KD.TEACHER.CONFIG_FILE."
            )
        opts = tuple(str(word) for word in node.OPTS)
        # Before the teacher's run is made: that knows no arm to name.
        given = "" if node.WEIGHTS == "auto" else self._identity(node.WEIGHTS, owner)
        source = f"its overrides and KD.TEACHER.OPTS of {owner}"
        run = self._teacher(Path(node.CONFIG_FILE).resolve(), opts, node.WEIGHTS, source)
        if node.WEIGHTS == "auto":
            return run, str(run.checkpoint), run.folder.name
        own_cfg = self._config(run.config_file, (*self.recipe.overrides, *opts), source)
        return run, node.WEIGHTS, f"{given} {model_identity(own_cfg)}"

    def _check_test_sets(self) -> None:
        first = next(iter(self.test_sets.values()))
        if len(first) != 1 or len(set(self.test_sets.values())) != 1:
            found = "; ".join(f"{k}: {list(v)}" for k, v in self.test_sets.items())
            raise RecipeError(
                "All runs of a recipe must be evaluated on the same one test set, found "
                f"{found}. Set DATASETS.TEST in the recipe's `overrides`."
            )


def _hash(cfg: CfgNode, identities: dict[str, str]) -> str:
    """
    Hash what decides a run's outcome, and nothing about where it lies on this machine.

    Only settings that differ from their defaults count, so that a new key makes no old run strange.
    """
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = ""
    cfg.KD.TEACHER.WEIGHTS = ""  # its content is among the identities
    cfg.KD.TEACHER.CONFIG_FILE = Path(cfg.KD.TEACHER.CONFIG_FILE).name
    return digest_of_values([changed_settings(cfg), identities])
