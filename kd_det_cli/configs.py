"""
Copy the configs that ship with kd_det, and train_net.py, into a folder: here, if none is given.

Afterwards every command of the README works there. Files that are there already with another
content are not touched: then nothing is copied.
"""

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_SHIPPED = ("configs", "train_net.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: here"
    )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """
    Copy the files.

    Returns:
        Exit code: 0 done, 2 some are there with another content, or cannot be written.
    """
    root = shipped_root()
    files = [file for name in _SHIPPED for file in _files_of(root / name)]
    goals = {file: args.folder / file.relative_to(root) for file in files}
    try:
        changed = [goal for file, goal in goals.items() if _differs(file, goal)]
        if changed:
            names = ", ".join(map(str, changed[:3])) + (", ..." if len(changed) > 3 else "")
            return _stop(
                f"{len(changed)} files are there with another content ({names}); nothing was "
                "copied. Name another folder, or move them away."
            )
        for file, goal in goals.items():
            goal.parent.mkdir(parents=True, exist_ok=True)
            if not goal.exists():
                shutil.copyfile(file, goal)
    except OSError as error:
        return _stop(f"{args.folder} cannot be written: {error}")
    print(f"{len(goals)} files: {', '.join(str(args.folder / name) for name in _SHIPPED)}")
    return 0


def shipped_root() -> Path:
    """Return the folder of configs/ and train_net.py: in the package, or a checkout's root."""
    # Found, not imported: that would take Detectron2 and seconds.
    spec = importlib.util.find_spec("kd_det")
    assert spec is not None and spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _differs(file: Path, goal: Path) -> bool:
    return goal.exists() and goal.read_bytes() != file.read_bytes()


def _stop(message: str) -> int:
    print(f"kd-det configs: {message}", file=sys.stderr)
    return 2
