"""What a training job shows its user: plain text where it is kept, messages without tracebacks."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from kd_det.engine.launch import ProcessFailed, log_error
from kd_det.text import INPUT_ERRORS, message_of

_LOGGERS = ("detectron2", "fvcore", "kd_det")
# Log files that could not be written, of a full disk.
_UNWRITABLE: set[str] = set()
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _PlainFormatter(logging.Formatter):
    """Another formatter's text without codes for colours."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format by the other one and take the codes out."""
        return _COLOURS.sub("", self._inner.format(record))


def settle_handlers() -> None:
    """
    Of what Detectron2's `setup_logger` made: no colours in files, no tracebacks on the console.

    Tables come with colours in their text, and a console may be a file, or a pipe into one.
    """
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            inner = handler.formatter
            if not isinstance(handler, logging.StreamHandler) or inner is None:
                continue
            on_console = handler.stream in (sys.stdout, sys.stderr)
            shown = on_console and handler.stream.isatty()
            if not shown and not isinstance(inner, _PlainFormatter):
                handler.setFormatter(_PlainFormatter(inner))
            if on_console and not handler.filters:
                handler.addFilter(_without_traceback)
            if not on_console:
                handler.handleError = _say_once(handler)  # type: ignore[method-assign, assignment]


def _say_once(handler: logging.StreamHandler[TextIO]) -> Callable[[logging.LogRecord], None]:
    """Return what a handler does when its file cannot be written: tell that, the first time."""
    file = getattr(handler.stream, "name", "the log")

    def tell(record: logging.LogRecord) -> None:
        if file not in _UNWRITABLE:
            _UNWRITABLE.add(file)
            error = sys.exc_info()[1]
            print(f"{file} cannot be written ({error}); it lacks what follows.", file=sys.stderr)

    return tell


def _without_traceback(record: logging.LogRecord) -> bool:
    """The message ends the program's output; see `plain_errors`."""
    return not record.exc_info


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """
    End the program with an error's message alone; its traceback goes to the run's log file.

    Before there is a log file, only errors in what the user gave are shown so: those that have a
    message made for users.

    Raises:
        SystemExit: 1 after an error, 130 after Ctrl-C or a termination signal.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. Continue with --resume.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        logged = _log_file()
        if isinstance(error, ProcessFailed):
            print(f"\n{error}", file=sys.stderr)
            sys.exit(1)
        if logged is None and not isinstance(error, INPUT_ERRORS):
            raise
        log_error()
        print(f"\n{type(error).__name__}: {message_of(error)}", file=sys.stderr)
        if logged is not None and logged not in _UNWRITABLE:
            print(f"The traceback is in {logged}.", file=sys.stderr)
        sys.exit(1)


def _log_file() -> str | None:
    """Return the file that kd_det's messages go to, if there is one."""
    for handler in logging.getLogger("kd_det").handlers:
        name = getattr(getattr(handler, "stream", None), "name", "")
        if isinstance(name, str) and name.endswith(".txt"):
            return name
    return None
