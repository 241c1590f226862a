"""
Draw what a distiller looks at.

"pgd" draws the teacher's importance of every position, per level, for both towers; "ssim" the
structural similarity of student and teacher, per level, for two checkpoints of the student.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_PICTURES = {
    "pgd": "the teacher's importance of every position",
    "ssim": "the similarity of student and teacher, for two checkpoints of the student",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    pictures = parser.add_subparsers(dest="what", required=True, metavar="|".join(_PICTURES))
    for name, summary in _PICTURES.items():
        sub = pictures.add_parser(name, help=summary, description=f"Draw {summary}.")
        sub.add_argument("--config-file", required=True, help="config of a run with that distiller")
        sub.add_argument("--out", required=True, type=Path, help="PNG file")
        sub.add_argument("--images", type=int, default=2, help="images of the test set, default 2")
        sub.add_argument("--skip", type=int, default=0, help="images of the test set to pass over")
        if name == "ssim":
            sub.add_argument(
                "--before", required=True, help="checkpoint of the student, say without a teacher"
            )
            sub.add_argument("--after", required=True, help="checkpoint of the distilled student")
        sub.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """
    Draw the picture.

    Returns:
        Exit code: 0 done, 2 the config or the arguments are wrong.
    """
    from kd_det.experiments.show import draw_importance, draw_similarity
    from kd_det.text import INPUT_ERRORS, message_of

    options = {"out": args.out, "images": args.images, "skip": args.skip}
    try:
        if args.what == "pgd":
            draw_importance(args.config_file, args.opts, **options)
        else:
            checkpoints = {"before": args.before, "after": args.after}
            draw_similarity(args.config_file, args.opts, checkpoints, **options)
    except INPUT_ERRORS as error:
        print(f"kd-det show: {message_of(error)}", file=sys.stderr)
        return 2
    print(args.out)
    return 0
