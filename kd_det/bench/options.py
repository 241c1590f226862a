"""The options that all benchmarks have."""

import argparse


def add_options(
    parser: argparse.ArgumentParser,
    *,
    size: tuple[int, int],
    size_help: str,
    rounds: int,
    rounds_help: str,
    quick_help: str,
) -> None:
    """
    Add --device, --size, --rounds and --quick.

    Args:
        parser: of the benchmark.
        size: default (height, width) in pixels.
        size_help: what has that size.
        rounds: default number of rounds.
        rounds_help: what a round measures.
        quick_help: what --quick makes small.
    """
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=size,
        metavar=("HEIGHT", "WIDTH"),
        help=f"{size_help} (default: {size[0]} {size[1]})",
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"{rounds_help} (default: {rounds})"
    )
    parser.add_argument("--quick", action="store_true", help=quick_help)
