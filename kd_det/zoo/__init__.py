"""Teachers that ship with kd_det, addressed as `kd_det://<name>`."""

from kd_det.zoo.handler import register_handler
from kd_det.zoo.index import PREFIX, Entry, checked_path, find, read_entries

__all__ = ["PREFIX", "Entry", "checked_path", "find", "read_entries", "register_handler"]
