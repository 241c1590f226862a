"""`kd-det compare`: train what a recipe names, and report what each arm gains over the baseline."""

import argparse
import contextlib
import fcntl
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_det.experiments.environment import shown_command
from kd_det.experiments.figure import draw_report
from kd_det.experiments.ground_truth import check_test_set, load_ground_truth
from kd_det.experiments.plan import Plan, make_plan
from kd_det.experiments.progress import Display
from kd_det.experiments.recipe import Recipe, RecipeError, read_recipe
from kd_det.experiments.report import (
    Outcome,
    build_report,
    comparison_lines,
    markdown,
    read_detections,
    table,
)
from kd_det.experiments.runs import RUNNER, RunFailed, cores, execute, read_result
from kd_det.files import write_json


def main(argv: Sequence[str], runner: Sequence[str] = RUNNER) -> int:
    """
    Run the subcommand.

    Args:
        argv: arguments after `kd-det compare`.
        runner: command of a training run, to which its arguments are appended.

    Returns:
        Exit code: 0 done, 1 a run failed, 2 the recipe or the arguments are wrong, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        recipe = _recipe(args)
        plan = make_plan(recipe, args.out)
        check_test_set(plan.baseline_cfg)
    except (RecipeError, FileNotFoundError, KeyError, ValueError) as error:
        return _stop(str(error.args[0]), 2)
    try:
        with _claimed(args.out), _terminable():
            _run(plan, args.jobs, runner)
            _write(recipe, plan, args.out, shown_command("kd-det compare", argv))
    except (RunFailed, OSError) as error:
        return _stop(str(error), 1)
    except KeyboardInterrupt:
        return _stop("Interrupted. Repeat the same command to continue.", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kd-det compare", description=__doc__)
    parser.add_argument("--recipe", required=True, help="yaml file of teacher, arms and seeds")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and the report")
    parser.add_argument(
        "--jobs", type=int, help="students at a time; default: 1 with a GPU, else one per core"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--arms", nargs="+", help="only these, and the baseline")
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = read_recipe(args.recipe)
    if args.seeds:
        recipe = recipe.with_seeds(args.seeds)
    if args.arms:
        recipe = recipe.select(args.arms)
    if args.jobs is not None and args.jobs < 1:
        raise RecipeError(f"--jobs must be at least 1, found {args.jobs}.")
    return recipe


def _run(plan: Plan, jobs: int | None, runner: Sequence[str]) -> None:
    students = [run for run in plan.students.values() if read_result(run) is None]
    if jobs is None:
        # No more jobs than students, so that each gets its share of the cores.
        jobs = 1 if torch.cuda.is_available() else max(1, min(cores(), len(students)))
    display = Display()
    try:
        execute(plan.runs, jobs, display, runner)
    finally:
        display.close()


def _write(recipe: Recipe, plan: Plan, out: Path, command: str) -> None:
    outcomes = {
        run: Outcome(result=read_result(run) or {}, detections=read_detections(run.folder))
        for run in plan.runs
    }
    truth = load_ground_truth(plan.baseline_cfg)
    print("Comparing the detections, with intervals ...", file=sys.stderr, flush=True)
    report = build_report(recipe, plan, outcomes, truth, command)
    write_json(out / "report.json", report)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    first = {name: outcomes[plan.students[name, recipe.seeds[0]]] for name in _arm_names(report)}
    draw_report(report, truth, {k: o.detections for k, o in first.items()}, out / "report.png")
    print(table(report, "simple"))
    for line in comparison_lines(report):
        print(line)
    print(f"\nReport: {out / 'report.md'}, {out / 'report.json'}, {out / 'report.png'}")


def _arm_names(report: dict[str, Any]) -> list[str]:
    return [arm["name"] for arm in report["arms"]]


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


def _stop(message: str, code: int) -> int:
    print(f"kd-det compare: {message}", file=sys.stderr)
    return code
