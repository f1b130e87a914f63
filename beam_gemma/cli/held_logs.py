"""What Beam tells of a failing job, held back for the one sentence that the job ends with.

Beam logs and prints the traceback of a failed step once for each process and thread that it
passes, hundreds of lines in all, although the runner raises the same error. Warnings are shown as
they come.
"""

import ast
import logging
import os
import re
import sys
import tempfile
from contextlib import ExitStack, redirect_stderr
from io import TextIOWrapper, UnsupportedOperation
from types import TracebackType

MAX_HELD = 1000
"""Most records that are kept; later ones are dropped."""
BOOT = (
    "No semi_persistent_directory found",
    "Discarding unparseable args",
    "Resource module is not available",
)
"""How the warnings begin that every worker process logs when it starts and loads a model."""
WORKER = re.compile(r'severity: .*?message: "(?P<message>(?:[^"\\]|\\.)*)"')
"""A record that a worker process sent, as Beam's local runner logs it."""
STDERR = 2
"""The descriptor that worker processes inherit."""


class HeldLogs(logging.Handler):
    """Context manager that keeps Beam's errors back until the job has ended.

    Inside, errors that Beam logs are kept, and so is what is printed on standard error. If the
    block ends without an error, all of it is shown; else the error tells enough. Warnings pass;
    those of worker processes lose what Beam wraps them in.
    """

    def __init__(self, *, with_workers: bool) -> None:
        """Prepare to hold back what this process logs and prints.

        Args:
            with_workers: Whether to keep what worker processes and native code print, too. Without
                worker processes, native code may end this process, and its last words matter.
        """
        super().__init__()
        self._with_workers = with_workers
        self._root = logging.getLogger()
        self._beam = logging.getLogger("apache_beam")
        self._held: list[logging.LogRecord] = []
        self._undo = ExitStack()
        self.stream = sys.stderr
        """Standard error as it was, for what is to be shown."""

    def __enter__(self) -> "HeldLogs":
        if not self._root.handlers:
            logging.basicConfig()
        self._printed = self._undo.enter_context(tempfile.TemporaryFile("w+", buffering=1))
        if self._with_workers:
            self._take_descriptor()
        self._undo.enter_context(redirect_stderr(self._printed))
        self._undo.callback(setattr, self._beam, "propagate", self._beam.propagate)
        self._beam.propagate = False
        self._beam.addHandler(self)
        self._undo.callback(self._beam.removeHandler, self)
        self._root.addFilter(self._passes)
        self._undo.callback(self._root.removeFilter, self._passes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._printed.seek(0)
        printed = "" if error is not None else self._printed.read()
        self._undo.close()
        sys.stderr.write(printed)
        for record in self._held if error is None else ():
            self._root.handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record of Beam, unless it is an error."""
        if not _worker_message(record).startswith(BOOT) and self._passes(record):
            self._root.callHandlers(_unwrapped(record))

    def _passes(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged now; keep it otherwise."""
        is_beams = record.name.partition(".")[0] in ("root", "apache_beam")
        if not is_beams or record.levelno < logging.ERROR:
            return True
        if len(self._held) < MAX_HELD:
            self._held.append(record)
        return False

    def _take_descriptor(self) -> None:
        """Let what goes to the descriptor itself be kept; log handlers write to a copy of it."""
        copy = os.dup(STDERR)
        os.dup2(self._printed.fileno(), STDERR)
        self._undo.callback(os.close, copy)
        self._undo.callback(os.dup2, copy, STDERR)
        if not _is_descriptor(self.stream):
            return
        former, self.stream = self.stream, open(copy, "w", buffering=1, closefd=False)  # noqa: SIM115
        self._undo.callback(self.stream.flush)
        for handler in self._root.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is former:
                handler.setStream(self.stream)
                self._undo.callback(handler.setStream, former)


def is_verbose() -> bool:
    """Return whether the command shows more than warnings, as `--verbose` sets it."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def _is_descriptor(stream: object) -> bool:
    try:
        return isinstance(stream, TextIOWrapper) and stream.fileno() == STDERR
    except UnsupportedOperation:  # a stream in memory
        return False


def _unwrapped(record: logging.LogRecord) -> logging.LogRecord:
    """Return the record of a worker process as that process logged it; others as they are."""
    message = _worker_message(record)
    if not message:
        return record
    return logging.LogRecord("worker", record.levelno, record.pathname, 0, message, None, None)


def _worker_message(record: logging.LogRecord) -> str:
    """Return the message of a worker process that a record wraps, or an empty string."""
    told = WORKER.search(record.getMessage()) if record.name.startswith("apache_beam") else None
    return ast.literal_eval(f'b"{told["message"]}"').decode() if told else ""
