"""Measure speed and memory side by side with other implementations."""

import argparse
import ast
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def find_benchmarks(folder: Path) -> dict[str, str]:
    """
    Find the benchmarks without importing them, which would import torch.

    Args:
        folder: of Python modules. Those with `add_arguments` and `main` are benchmarks.

    Returns:
        Name -> summary, the first line of the module's docstring, in the order of the names.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {"add_arguments", "main"} <= functions:
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0].rstrip(".")
    return found


def bench_folder() -> Path:
    """Return the folder of kd_det's benchmarks, without importing kd_det."""
    spec = importlib.util.find_spec("kd_det")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    benches = find_benchmarks(bench_folder())
    subs = parser.add_subparsers(
        dest="bench", required=True, metavar="|".join(benches), parser_class=_BenchParser
    )
    for name, summary in benches.items():
        sub = subs.add_parser(name, help=summary, description=summary)
        sub.set_defaults(bench=name)
        sub.add_argument("--out", type=Path, required=True, help="JSON file to write")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run one benchmark and write what it measured; return the exit code."""
    from kd_det.experiments.environment import describe_environment, shown_command
    from kd_det.files import write_json

    report: dict[str, Any] = _module(args.bench).main(args)
    report.setdefault("command", shown_command("kd-det bench", argv))
    report.setdefault("environment", describe_environment())
    write_json(args.out, report)
    print(f"Wrote {args.out}")
    return 0


class _BenchParser(argparse.ArgumentParser):
    """Parser of one benchmark, which is imported only when its own arguments are read."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        _module(self.get_default("bench")).add_arguments(self)
        return super().parse_known_args(args, namespace)


def _module(name: str) -> Any:
    return importlib.import_module(f"kd_det.bench.{name}")
