"""The `kd-det` command: one module per subcommand, imported only when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "compare": "train what a recipe names and report what each arm gains, with intervals",
    "zoo": "list the teachers that ship, by the address that configs give them",
    "show": "draw what a distiller looks at",
    "bench": "measure speed and memory side by side with other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the process's exit code."""
    commands = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="kd-det",
        description=f"Knowledge distillation for Detectron2\n\ncommands:\n{commands}",
        usage="kd-det COMMAND [arguments]; kd-det COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=sorted(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help()
        return 2
    args = parser.parse_args(words)
    module = importlib.import_module(f"kd_det.cli.{args.command}")
    return int(module.main(args.rest))
