"""Progress of a job: a meter that tasks feed, and a display that the launcher owns.

The meter counts for the whole process. A local job runs in the launcher's process, so there the
display is live; a remote job is watched through Beam's metrics instead.
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

from beam_gemma.monitoring.charts import duration

METRICS_NAMESPACE = "beam_gemma"
"""Namespace of all Beam metrics of this project."""
BAR_SECS = 0.2
"""Seconds between two refreshes of the bar on a terminal."""
LINE_SECS = 10.0
"""Seconds between two lines if the output is not a terminal."""


@runtime_checkable
class Stream(Protocol):
    """Methods that a display needs of its output stream."""

    def write(self, text: str, /) -> int:
        """Write a text."""

    def flush(self) -> None:
        """Flush written text."""

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Counts of rows and tokens processed so far."""

    rows: int = 0
    """Finished rows, failed ones included."""
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Count") -> "Count":
        return self._combined(other, 1)

    def __sub__(self, other: "Count") -> "Count":
        return self._combined(other, -1)

    def _combined(self, other: "Count", sign: int) -> "Count":
        return Count(
            rows=self.rows + sign * other.rows,
            failed=self.failed + sign * other.failed,
            prompt_tokens=self.prompt_tokens + sign * other.prompt_tokens,
            completion_tokens=self.completion_tokens + sign * other.completion_tokens,
        )


class Meter:
    """Adds up counts from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = Count()

    def add(self, count: Count) -> None:
        """Add counts of newly finished work."""
        with self._lock:
            self._count += count

    def read(self) -> Count:
        """Return the total since the process started."""
        with self._lock:
            return self._count


METER = Meter()
"""The meter of this process."""


class Display:
    """Context manager that shows a job's progress on a stream, from a thread of its own."""

    def __init__(
        self,
        total_rows: int | None,
        *,
        meter: Meter = METER,
        stream: Stream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a display.

        Args:
            total_rows: Number of rows of the job; None if unknown.
            meter: Meter to show; earlier counts are subtracted.
            stream: Stream to write to; standard error by default.
            clock: Monotonic clock, in seconds.
        """
        self._total = total_rows
        self._meter = meter
        self._stream: Stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="progress", daemon=True)
        self._width = 0

    def __enter__(self) -> "Display":
        self._start = self._clock()
        self._before = self._meter.read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._is_terminal:
            self.show()
            self._stream.write("\n")
            self._stream.flush()

    def show(self) -> None:
        """Write the current state once: over the previous one on a terminal, else as a new line."""
        count = self._meter.read() - self._before
        line = describe(count, self._total, self._clock() - self._start)
        if self._is_terminal:
            # Trailing spaces erase the rest of a longer previous line.
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _refresh(self) -> None:
        while not self._stopped.wait(BAR_SECS if self._is_terminal else LINE_SECS):
            self.show()


def describe(count: Count, total_rows: int | None, elapsed_secs: float) -> str:
    """Return one line: rows, failures, tokens per second and the time left."""
    parts = [f"{count.rows:,} rows" if total_rows is None else _share(count.rows, total_rows)]
    if count.failed:
        parts.append(f"{count.failed:,} failed")
    per_sec = 1 / elapsed_secs if elapsed_secs > 0 else 0.0
    rates = f"{count.prompt_tokens * per_sec:,.0f}"
    if count.completion_tokens:
        rates += f" prompt + {count.completion_tokens * per_sec:,.1f} completion"
    parts.append(f"{rates} tokens/s")
    if total_rows is not None and count.rows:
        left_secs = elapsed_secs * max(total_rows - count.rows, 0) / count.rows
        parts.append(f"{duration(round(left_secs))} left")
    return ", ".join(parts)


def _share(rows: int, total_rows: int) -> str:
    percent = 100 * rows // total_rows if total_rows else 100
    return f"{rows:,}/{total_rows:,} rows ({percent} %)"
