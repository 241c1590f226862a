"""
The `kd-det` command: parses and prints.

It stands outside `kd_det`, whose import registers everything with Detectron2 and so takes seconds:
a module here imports of `kd_det` only in the function that does the work. A subcommand is one
module, its docstring the help, with `add_arguments(parser)` and `run(args, argv) -> exit code`.
"""

import argparse
import sys
from collections.abc import Sequence

from kd_det_cli import bench, compare, configs, distill, show, train, zoo

COMMANDS = {
    "distill": distill,
    "train": train,
    "compare": compare,
    "show": show,
    "bench": bench,
    "zoo": zoo,
    "configs": configs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv: arguments after `kd-det`; None: those of this process.

    Returns:
        The process's exit code; 2 where the arguments are wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    whole = parser()
    args = whole.parse_args(words)
    if args.command is None:
        whole.print_help()
        return 2
    return COMMANDS[args.command].run(args, words[1:])


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of all subcommands."""
    whole = argparse.ArgumentParser(
        prog="kd-det", description="Knowledge distillation for Detectron2"
    )
    commands = whole.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        text = str(module.__doc__)
        summary = text.strip().split("\n")[0]
        sub = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return whole
