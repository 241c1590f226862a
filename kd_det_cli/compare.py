"""Train what a recipe names, and report what each arm gains over the baseline, with intervals."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("--recipe", required=True, help="yaml file of teacher, arms and seeds")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and the report")
    parser.add_argument(
        "--jobs", type=int, help="students at a time; default: 1 with a GPU, else one per core"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--arms", nargs="+", help="only these, and the baseline")
    parser.add_argument(
        "--practical",
        type=float,
        default=0.3,
        help="AP points below which a difference does not matter; default 0.3",
    )


def run(args: argparse.Namespace, argv: Sequence[str], runner: Sequence[str] | None = None) -> int:
    """
    Run the subcommand.

    Args:
        args: what `add_arguments` adds.
        argv: the words after `kd-det compare`, for the report.

    Returns:
        Exit code: 0 done, 1 a run failed, 2 the recipe or the arguments are wrong, 130 interrupted.
    """
    from kd_det.experiments.compare import Comparison
    from kd_det.experiments.environment import shown_command
    from kd_det.experiments.pages import comparison_lines, pull_table, table
    from kd_det.experiments.recipe import RecipeError
    from kd_det.experiments.runs import RunFailed
    from kd_det.text import INPUT_ERRORS, message_of

    try:
        comparison = Comparison.prepare(
            args.recipe,
            args.out,
            seeds=args.seeds,
            arms=args.arms,
            jobs=args.jobs,
            practical=args.practical,
        )
    except INPUT_ERRORS as error:
        return _stop(message_of(error), 2)
    try:
        report = comparison.carry_out(shown_command("kd-det compare", argv))
    except RecipeError as error:
        return _stop(str(error), 2)
    except (RunFailed, OSError) as error:
        return _stop(str(error), 1)
    except KeyboardInterrupt:
        return _stop("Interrupted. Repeat the same command to continue.", 130)
    print(table(report, "simple"))
    for line in comparison_lines(report):
        print(line)
    if pulls := pull_table(report, "simple"):
        print(f"\n{pulls}")
    print(f"\nReport: {', '.join(str(path) for path in comparison.pages)}")
    return 0


def _stop(message: str, code: int) -> int:
    print(f"kd-det compare: {message}", file=sys.stderr)
    return code
