"""
Which teachers ship with kd_det: `index.json`, and the weights beside it.

A file counts only if its sha256 is the index's: one that is damaged, or that something else was
saved over, is refused before a tensor of it is read.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from kd_det.files import read_json, sha256_of, write_json
from kd_det.text import nearest

PREFIX = "kd_det://"
FOLDER = Path(__file__).parent
_INDEX = "index.json"


@dataclass(frozen=True)
class Entry:
    """One teacher: what it is, what it reaches, and how to train it again."""

    # Address after the prefix; the weights lie in "<name>.pth".
    name: str
    sha256: str
    size_bytes: int
    summary: str
    parameters: int
    classes: list[str]
    # Names of data sets; AP in percent, of the file as shipped, by data set.
    trained_on: list[str]
    ap: dict[str, float]
    licence: str
    # How it was made: from the repository's root, with the config's own seed.
    config: str
    command: str
    seed: int
    iterations: int
    hours: float

    @property
    def address(self) -> str:
        """What KD.TEACHER.WEIGHTS and MODEL.WEIGHTS take."""
        return f"{PREFIX}{self.name}"


def read_entries(folder: Path | None = None) -> dict[str, Entry]:
    """
    Return the teachers that ship, by name.

    Args:
        folder: another folder with an index, instead of the package's.
    """
    content = read_json((folder or FOLDER) / _INDEX) or {}
    return {name: Entry(name=name, **item) for name, item in content.items()}


def write_entry(entry: Entry, folder: Path | None = None) -> None:
    """Add an entry to the index, or replace the one of the same name; arguments as above."""
    entries = {**read_entries(folder), entry.name: entry}
    content = {name: asdict(entries[name]) for name in sorted(entries)}
    for item in content.values():
        del item["name"]
    write_json((folder or FOLDER) / _INDEX, content)


def find(address: str, folder: Path | None = None) -> Entry:
    """
    Return the entry of an address like "kd_det://shapes2/fcos_r18".

    Raises:
        FileNotFoundError: no teacher of that name ships; the message lists the nearest names.
    """
    name = address.removeprefix(PREFIX)
    entries = read_entries(folder)
    if name not in entries:
        near = nearest(name, entries) if entries else f"{(folder or FOLDER) / _INDEX} lists none"
        raise FileNotFoundError(
            f"No teacher called {name!r} ships with kd_det ({PREFIX}{name}): {near}. "
            "`kd-det zoo` lists them all."
        )
    return entries[name]


def weights_path(name: str, folder: Path | None = None) -> Path:
    """Return where the weights of that name lie, or would lie."""
    return (folder or FOLDER) / f"{name}.pth"


def checked_path(address: str, folder: Path | None = None) -> Path:
    """
    Return the file of an address, after checking that it is what the index says.

    Raises:
        FileNotFoundError: no such name, or its file is gone.
        ValueError: the file's sha256 is another one.
    """
    entry = find(address, folder)
    path = weights_path(entry.name, folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{entry.address} should be {path}, but there is no such file: this installation of "
            "kd_det is incomplete. Install it again."
        )
    found = sha256_of(path)
    if found != entry.sha256:
        raise ValueError(
            f"{entry.address} is {path}, whose sha256 is {found[:12]}..., expected "
            f"{entry.sha256[:12]}...: the file is damaged or not kd_det's. Install kd_det again, "
            f"or train the teacher yourself ({entry.command}) and name its checkpoint."
        )
    return path
