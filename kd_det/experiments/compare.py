"""A comparison from its recipe to its report: what `kd-det compare` does."""

import contextlib
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_det.experiments.figure import draw_report
from kd_det.experiments.finished import read_result
from kd_det.experiments.ground_truth import (
    GroundTruth,
    check_ground_truth,
    check_test_set,
    load_ground_truth,
)
from kd_det.experiments.page.build import html_page
from kd_det.experiments.pages import markdown
from kd_det.experiments.plan import Plan, Run, make_plan
from kd_det.experiments.progress import Display, clock
from kd_det.experiments.recipe import Recipe, RecipeError, read_recipe
from kd_det.experiments.rehearsal import rehearse_runs
from kd_det.experiments.report import Outcome, build_report, read_detections
from kd_det.experiments.runs import RunFailed, cores, execute
from kd_det.files import read_json, write_json, write_text, write_whole

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Comparison:
    """A recipe with its runs, in its output folder."""

    recipe: Recipe
    plan: Plan
    out: Path
    # Students at a time; None: one with a GPU, else one per core.
    jobs: int | None = None
    # AP points; a difference below it does not matter.
    practical: float = 0.3

    @classmethod
    def prepare(
        cls,
        recipe_file: str,
        out: Path,
        *,
        seeds: Sequence[int] | None = None,
        arms: Sequence[str] | None = None,
        jobs: int | None = None,
        practical: float = 0.3,
    ) -> "Comparison":
        """
        Read and check everything that can be checked before the first run.

        Args:
            recipe_file: see `read_recipe`.
            out: folder of all runs and the report.
            seeds: instead of the recipe's.
            arms: only these, the baseline, and the arms these start from.
            jobs: students at a time; None: one with a GPU, else one per core.
            practical: AP points; a difference below it does not matter.

        Raises:
            RecipeError: the recipe, or what is asked of it, cannot be carried out; or the folder
                holds the report of another recipe.
            FileNotFoundError, KeyError, ValueError: from the configs and the data sets.
        """
        recipe = read_recipe(recipe_file)
        if seeds:
            recipe = recipe.with_seeds(seeds)
        if arms:
            recipe = recipe.select(arms)
        if jobs is not None and jobs < 1:
            raise RecipeError(f"--jobs must be at least 1, found {jobs}.")
        if not practical > 0:
            raise RecipeError(f"--practical must be AP points above 0, found {practical}.")
        plan = make_plan(recipe, out)
        check_test_set(plan.baseline_cfg)
        comparison = cls(recipe, plan, out, jobs, practical)
        comparison.check_report()
        return comparison

    @property
    def pages(self) -> tuple[Path, Path, Path, Path]:
        """The files of the report: text, numbers, figure, and all of it to look at."""
        return (
            self.out / "report.md",
            self.out / "report.json",
            self.out / "report.png",
            self.out / "report.html",
        )

    def check_report(self) -> None:
        """
        Look whose report is in the folder; one of the same recipe is replaced.

        Raises:
            RecipeError: the folder holds the report of another recipe or test set, or one with arms
                or seeds that this one would lose.
        """
        there = read_json(self.pages[1])
        if there is None:
            return
        away = f"move {', '.join(path.name for path in self.pages)} away"
        found = there.get("name"), (there.get("test_set") or {}).get("name")
        own = self.recipe.name, *self.plan.baseline_cfg.DATASETS.TEST
        if found != own:
            raise RecipeError(
                f"{self.out} holds the report of recipe {found[0]} on {found[1]}, which this "
                f"recipe, {own[0]} on {own[1]}, would replace; choose another --out, or {away}."
            )
        arms = {arm.name for arm in self.recipe.arms}
        gone = {
            "arms": [arm["name"] for arm in there["arms"] if arm["name"] not in arms],
            "seeds": [x for x in there["arms"][0]["seeds"] if x not in self.recipe.seeds],
        }
        lost = [f"{what} {', '.join(map(str, items))}" for what, items in gone.items() if items]
        if lost:
            raise RecipeError(
                f"The report in {self.out} has {' and '.join(lost)}, which this call leaves out; "
                f"repeat it with them, choose another --out, or {away}."
            )

    def carry_out(self, command: str) -> dict[str, Any]:
        """
        Carry out the runs that have no result yet, and write the report.

        Args:
            command: the command line, for the report.

        Returns:
            The content of report.json.

        Raises:
            RecipeError: from `check_report`; or a run would fail, see `rehearse_runs`; or the test
                set cannot be judged on.
            RunFailed: a run failed, or the folder cannot be written or is taken.
            OSError: the report cannot be written.
            KeyboardInterrupt: interrupted or terminated; the runs were ended.
        """
        with _claimed(self.out), _terminable():
            self.check_report()  # again: another comparison may have ended here meanwhile
            rehearse_runs([r for r in self.plan.runs if read_result(r) is None], self.out)
            check_ground_truth(load_ground_truth(self.plan.baseline_cfg))
            self._execute()
            return self._write(command)

    def _execute(self) -> None:
        students = [run for run in self.plan.students.values() if read_result(run) is None]
        jobs = self.jobs
        if jobs is None:
            # No more jobs than students, so that each gets its share of the cores.
            jobs = 1 if torch.cuda.is_available() else max(1, min(cores(), len(students)))
        display = Display()
        try:
            execute(self.plan.runs, jobs, display)
            # What had to be done again makes stale what was made from it, and that what follows.
            for _ in self.plan.runs:
                if all(read_result(run) is not None for run in self.plan.runs):
                    break
                execute(self.plan.runs, jobs, display)
        finally:
            display.close()

    def _write(self, command: str) -> dict[str, Any]:
        outcomes = {
            run: Outcome(result=read_result(run) or {}, detections=read_detections(run.folder))
            for run in self.plan.runs
        }
        truth = load_ground_truth(self.plan.baseline_cfg)
        print("Comparing the detections, with intervals ...", file=sys.stderr, flush=True)
        report = build_report(
            self.recipe,
            self.plan,
            outcomes,
            truth,
            command,
            practical=self.practical,
            progress=_teller(),
        )
        self._write_pages(report, outcomes, truth)
        return report

    def _write_pages(
        self, report: dict[str, Any], outcomes: Mapping[Run, Outcome], truth: GroundTruth
    ) -> None:
        page, numbers, figure, everything = self.pages
        write_json(numbers, report)
        write_text(page, markdown(report))
        seed = self.recipe.seeds[0]
        first = {
            arm["name"]: outcomes[self.plan.students[arm["name"], seed]].detections
            for arm in report["arms"]
        }
        write_whole(figure, lambda file: draw_report(report, truth, first, file))
        write_text(everything, html_page(report, self.plan, outcomes, truth))


def _teller() -> Callable[[int, int], None]:
    """Return what says now and then how many of all arms are done."""
    start = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            left = clock((now - start) / done * (total - done))
            print(f"{done} of {total} arms, {left} left", file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the output folder: two comparisons in one folder would write into each other's runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise RunFailed(
            f"The folder {out} cannot be written ({error}); choose another --out."
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(
                f"Another `kd-det compare` is at work in {out}; choose another --out."
            ) from None
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a termination signal end the training processes just as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
