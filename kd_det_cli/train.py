"""
Train, resume or evaluate what a config names: train_net.py as a command.

Takes the arguments of train_net.py. Under torchrun it is `torchrun ... -m kd_det.engine`.
`kd-det configs` copies train_net.py here, to be changed where a config is not enough.
"""

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments, which are those of Detectron2's parser."""
    parser.add_argument("--config-file", required=True, help="yaml file, or a LazyConfig (.py)")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the student alone")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0")
    parser.add_argument("--dist-url", help="address at which the processes of all machines meet")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, at the end"
    )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """
    Run the subcommand.

    Args:
        args: what `add_arguments` adds, checked and no more.
        argv: the words after `kd-det train`, which train_net.py would be given.

    Raises:
        SystemExit: 1 the run failed, 130 it was interrupted.
    """
    from kd_det.engine.console import plain_errors
    from kd_det.engine.main import main

    with plain_errors():
        main(argv)
    return 0
