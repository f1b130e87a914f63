"""How long a worker takes from its machine's start to its first row, part by part, in its log.

The parts are the machine and its image, the process, the model's copy and checks, its loading, and
the first row. A Dataflow worker logs them; a local job does with --verbose.
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
    """Log how old this process is, and how long its machine took to come to it."""
    began = psutil.Process().create_time()
    LOGGER.info(
        "start: the process began %.1f s ago, %.1f s after its machine",
        time.time() - began,
        began - psutil.boot_time(),
    )


@contextmanager
def logged(part: str) -> Iterator[None]:
    """Log how long a block took, under the name of a part."""
    began = time.monotonic()
    yield
    LOGGER.info("start: %s in %.1f s", part, time.monotonic() - began)


class FirstRow:
    """A callback for each row, which logs when the first of them has come."""

    def __init__(
        self, callback: Callable[[Count], None], note: Callable[[float], None] = lambda _: None
    ) -> None:
        """Begin to wait.

        Args:
            callback: What else there is to do with each row; threads may call it at once.
            note: Told once how many seconds old this process was at the first row.
        """
        self._callback = callback
        self._note = note
        self._began = time.monotonic()
        self._is_first = threading.Lock()

    def __call__(self, count: Count) -> None:
        """Take a row."""
        if self._is_first.acquire(blocking=False):
            age = time.time() - psutil.Process().create_time()
            LOGGER.info(
                "start: first row %.1f s after the model was there, %.1f s after the process began",
                time.monotonic() - self._began,
                age,
            )
            self._note(round(age, 1))
        self._callback(count)
