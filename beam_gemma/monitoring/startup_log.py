"""Log of a worker's startup times, from the start of its machine to its first row.

The parts are the machine and its image, the process, the model's copy and checks, its loading, and
the first row. Dataflow workers always log them; local jobs only with --verbose.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from beam_gemma.monitoring.progress import Count

LOGGER = logging.getLogger(__name__)


def log_process() -> None:
    """Log the age of this process and the time from machine boot to process start."""
    began = psutil.Process().create_time()
    LOGGER.info(
        "start: the process began %.1f s ago, %.1f s after its machine",
        process_age(),
        max(0.0, began - psutil.boot_time()),
    )


def process_age() -> float:
    """Return the seconds since this process began, including the interpreter's start.

    It is 0 if the machine's clock was set back to before that time.
    """
    return max(0.0, time.time() - psutil.Process().create_time())


@contextmanager
def logged(part: str) -> Iterator[None]:
    """Log the duration of the enclosed block under the name of a startup part."""
    began = time.monotonic()
    yield
    LOGGER.info("start: %s in %.1f s", part, time.monotonic() - began)


class FirstRow:
    """Callback for each row that logs the time of the first one."""

    def __init__(
        self, callback: Callable[[Count], None], note: Callable[[float], None] = lambda _: None
    ) -> None:
        """Start the clock that runs until the first row.

        Args:
            callback: Called with each row's count, possibly from several threads at once.
            note: Called once with the age of this process at the first row, in seconds.
        """
        self._callback = callback
        self._note = note
        self._began = time.monotonic()
        self._is_first = threading.Lock()

    def __call__(self, count: Count) -> None:
        """Handle a row: log if it is the first, then call the callback."""
        if self._is_first.acquire(blocking=False):
            age = process_age()
            LOGGER.info(
                "start: first row %.1f s after the model was there, %.1f s after the process began",
                time.monotonic() - self._began,
                age,
            )
            self._note(round(age, 1))
        self._callback(count)
