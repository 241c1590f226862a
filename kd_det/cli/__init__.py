"""The `kd-det` command: one module per subcommand, imported only when it is called."""

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "compare": "train what a recipe names and report what each arm gains, with intervals",
    "show": "draw what a distiller looks at",
    "bench": "measure speed and memory side by side with other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="kd-det", description="Knowledge distillation for Detectron2"
    )
    parser.add_argument(
        "command",
        choices=sorted(COMMANDS),
        help="; ".join(f"{k}: {v}" for k, v in COMMANDS.items()),
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the subcommand")
    args = parser.parse_args(argv)
    module = importlib.import_module(f"kd_det.cli.{args.command}")
    return int(module.main(args.rest))
