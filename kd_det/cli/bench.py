"""`kd-det bench`: measure speed and memory side by side with other implementations."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_det.experiments.environment import describe_environment, shown_command
from kd_det.files import write_json

BENCHES = {
    "ssim": "SSIM between feature maps, forward and backward",
    "pgd": "PGD's quality scores and importance maps",
    "msad": "what a low-resolution student saves as a whole model",
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark and write what it measured; return the exit code."""
    parser = argparse.ArgumentParser(prog="kd-det bench", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="|".join(BENCHES))
    for name, summary in BENCHES.items():
        sub = benches.add_parser(name, help=summary, description=summary)
        sub.add_argument("--out", type=Path, required=True, help="JSON file to write")
        if name in argv[:1]:  # its libraries are imported only where they are used
            _module(name).add_arguments(sub)
    args = parser.parse_args(argv)
    report: dict[str, Any] = _module(args.bench).main(args)
    report.setdefault("command", shown_command("kd-det bench", argv))
    report.setdefault("environment", describe_environment())
    write_json(args.out, report)
    print(f"Wrote {args.out}")
    return 0


def _module(name: str) -> Any:
    return importlib.import_module(f"kd_det.bench.{name}")
