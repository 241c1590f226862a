"""One process at a time writes into a run's folder."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

try:
    import fcntl
except ImportError:  # a platform without record locks
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
# A training whose parent was killed takes a moment to end.
_PATIENCE_SECONDS = 30.0


@contextlib.contextmanager
def claimed(folder: str, patience: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """
    Hold a run's folder, in the main process of the job; the others follow it.

    The system lets go of it when the process ends, however it ends. Processes that it forks, such
    as loaders of data, do not hold it.

    Args:
        folder: OUTPUT_DIR of the run; it exists.
        patience: seconds to wait for another process to let go.

    Raises:
        RuntimeError: another process writes there.
    """
    if fcntl is None or not comm.is_main_process():
        yield
        return
    with open(Path(folder, ".lock"), "a+") as file:
        _lock(file.fileno(), folder, patience)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(handle: int, folder: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                _logger.warning(
                    "%s cannot be locked (%s): let one job at a time write there", folder, error
                )
                return
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
                raise RuntimeError(
                    f"Another training (process {holder}) writes into {folder}; wait for it or end "
                    "it, or set another OUTPUT_DIR."
                ) from None
            time.sleep(0.2)
