"""
List the teachers that ship with kd_det.

Name one as KD.TEACHER.WEIGHTS (with its config as KD.TEACHER.CONFIG_FILE) or as MODEL.WEIGHTS.
"add" is for maintainers: it ships what a training run made.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    commands = parser.add_subparsers(dest="action", metavar="add")
    add = commands.add_parser("add", help="for maintainers: ship what a training run made")
    add.add_argument("name", metavar="NAME", help="such as shapes2/fcos_r18")
    add.add_argument("--config-file", required=True, help="config of the run, from the root")
    add.add_argument("--run", required=True, type=Path, help="folder of the finished run")
    add.add_argument("--test", required=True, nargs="+", help="data sets to report AP of")
    add.add_argument("--summary", required=True, help="what net it is, in a few words")
    add.add_argument("--licence", default="Apache-2.0", help="SPDX name; default: Apache-2.0")
    add.add_argument("--folder", type=Path, help="another zoo's folder, instead of the package's")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """List the teachers, or add one; return the process's exit code."""
    from kd_det.experiments.zoo import add, table

    folder = None
    if args.action == "add":
        folder = args.folder
        add(
            args.name,
            config_file=args.config_file,
            run=args.run,
            test=args.test,
            summary=args.summary,
            licence=args.licence,
            folder=folder,
        )
    print(table(folder))
    return 0
