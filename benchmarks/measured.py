"""What a figure of this folder draws: measured anew from runs, or as it is committed."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(what: str, file: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """
    Read the command line, measure and write the file where it names a folder of runs, and read it.

    Args:
        what: a line of help, what the program does.
        file: JSON, of what was measured.
        measure: from the folder of `kd-det compare` to the file's content.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("folder", type=Path, nargs="?", help="where `kd-det compare` has written")
    folder = parser.parse_args().folder
    if folder:
        file.write_text(json.dumps(measure(folder), indent=1) + "\n")
    return dict(json.loads(file.read_text()))
