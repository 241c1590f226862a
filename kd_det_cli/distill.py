"""
Write the config of a distillation into --out, and train it.

The yaml, OUT/distill.yaml, is the truth: change it and train it by train_net.py whenever the
options here are not enough. What is checked before the first step is what train_net.py checks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument(
        "--teacher", required=True, help="the teacher's yaml, or kd_det://NAME of a shipped one"
    )
    parser.add_argument("--student", required=True, help="the student's own yaml")
    parser.add_argument(
        "--method", required=True, help="distillers in any case, comma separated: ssim,pgd"
    )
    parser.add_argument(
        "--data",
        metavar="TRAIN.json,VAL.json,IMAGES",
        help="own data in COCO format; default: what the student's yaml names",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the yaml and the run")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--num-gpus", type=int, default=1, help="as for train_net.py")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write the yaml, build everything once, train nothing",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="overrides; they become part of the yaml"
    )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """
    Run the subcommand.

    Returns:
        Exit code: 0 done, 2 the arguments are wrong.

    Raises:
        SystemExit: 1 the run failed, 130 it was interrupted.
    """
    from kd_det.config.own_data import OwnData
    from kd_det.config.writing import write_distillation
    from kd_det.engine.console import plain_errors
    from kd_det.engine.job import Job
    from kd_det.engine.main import main
    from kd_det.engine.rehearsal import rehearse_run
    from kd_det.experiments.environment import shown_command
    from kd_det.text import INPUT_ERRORS, message_of

    try:
        file = write_distillation(
            teacher=args.teacher,
            student=args.student,
            methods=args.method,
            out=args.out,
            data=OwnData.parse(args.data) if args.data else None,
            opts=args.opts,
            command=shown_command("kd-det distill", argv),
        )
    except INPUT_ERRORS as error:
        print(f"kd-det distill: {message_of(error)}", file=sys.stderr)
        return 2
    print(f"{file} is this run's config: train_net.py --config-file {file}", flush=True)
    words = ["--config-file", str(file), "--num-gpus", str(args.num_gpus)]
    with plain_errors():
        if args.dry_run:
            rehearse_run(Job.from_command_line(words).cfg)
            print("Teacher, student and data fit together. Nothing was trained.")
        else:
            main([*words, *(["--resume"] if args.resume else [])])
    return 0
