"""Pulse of an engine: timestamped samples of its totals, few enough to travel with results.

A sample contains totals since the engine started, so losing one only loses detail. Samples of
engines on several machines are merged into one timeline.
"""

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from beam_gemma.monitoring.processor import processor_of

MIN_SECS = 1.0
"""Shortest time between two samples, and shortest step of a timeline, in seconds."""
SAMPLES_PER_SPAN = 256
"""Samples are at least 1/256 of the elapsed time apart; a day yields about 1,800 samples."""
MAX_STEPS = 256
"""Most steps of a timeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceStats:
    """GPU statistics of a session since it was loaded; all zero on a CPU."""

    busy_secs: float = 0.0
    """Seconds spent running steps."""
    steps: int = 0
    replays: int = 0
    """Number of these steps that replayed a captured graph."""
    graphs: int = 0
    """Number of captured graphs."""
    used_mib: int = 0
    """GPU memory in use by all processes, in MiB."""
    total_mib: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Work of an engine since it started, or of one step."""

    prompt_tokens: int = 0
    """Computed prompt tokens, without cached ones and those of rows that share a request."""
    cached_tokens: int = 0
    """Prompt tokens found in a cache and hence not computed."""
    completion_tokens: int = 0
    used_slots: int = 0
    """Slots with a sequence, summed over decode steps; for steps over whole texts, tokens."""
    slots: int = 0
    used_cache: int = 0
    """Cache held by sequences, summed over steps, in blocks of one layer."""
    cache: int = 0
    """Cache capacity, summed over steps, in blocks of one layer."""

    def __add__(self, other: "Work") -> "Work":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)}
        return Work(**sums)


COLUMNS = tuple(field.name for kind in (Work, DeviceStats) for field in fields(kind))
"""Names of a sample's values, in order, after its time."""
GPU_SECS = "gpu_secs"


class Pulse:
    """Samples of one engine; `take` returns each of them once."""

    def __init__(
        self,
        device: str,
        *,
        stats: Callable[[], DeviceStats] = DeviceStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with zero work and a first sample.

        Args:
            device: Device of the engine: `cpu` or `cuda`.
            stats: Returns the device's statistics; called by the thread that has run a step.
            clock: Monotonic clock, in seconds.
        """
        self._engine = uuid.uuid4().hex
        self._device = device
        self._read_stats = stats
        self._clock = clock
        self._started = clock()
        self._since_epoch = time.time() - self._started
        self._lock = threading.Lock()  # guards the attributes below
        self._work = Work()
        self._stats = DeviceStats()
        self._first_row_secs: float | None = None
        self._samples: list[tuple[float, ...]] = []
        self._sample(self._started)

    def add(self, work: Work) -> None:
        """Add the work of a step, and take a sample if one is due; safe from any thread."""
        now, stats = self._clock(), self._read_stats()
        with self._lock:
            self._work += work
            self._stats = stats
            if now >= self._due:
                self._sample(now)

    def note_first_row(self, secs: float) -> None:
        """Set the time from the process's start to the engine's first row, in seconds."""
        with self._lock:
            self._first_row_secs = secs

    def counts(self) -> Counter[str]:
        """Return the totals for Beam's cache and device counters since the engine started."""
        with self._lock:
            work, stats = self._work, self._stats
        return Counter(
            used_cache=work.used_cache,
            cache=work.cache,
            gpu_busy_ms=int(1000 * stats.busy_secs),
            gpu_steps=stats.steps,
            gpu_replays=stats.replays,
        )

    def take(self) -> dict[str, Any]:
        """Return the samples since the last call, plus a current one, in JSON-serializable form."""
        now = self._clock()
        with self._lock:
            self._sample(now)
            samples, self._samples = self._samples, []
            first_row_secs = self._first_row_secs
        return {
            "engine": self._engine,
            "device": self._device,
            "processor": processor_of(self._device),
            "first_row_secs": first_row_secs,
            "samples": samples,
        }

    def _sample(self, now: float) -> None:
        figures = (*astuple(self._work), *astuple(self._stats))
        self._samples.append((round(now + self._since_epoch, 3), *figures))
        self._due = now + max(MIN_SECS, (now - self._started) / SAMPLES_PER_SPAN)


def used_mib(pulse: Mapping[str, Any]) -> int | None:
    """Return the GPU memory in use at the last sample, in MiB; None for a CPU."""
    last = dict(zip(COLUMNS, pulse["samples"][-1][1:], strict=True))
    return last["used_mib"] if last["total_mib"] else None


def timeline(pulses: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the summed totals of all engines at evenly spaced times.

    Args:
        pulses: Results of `take` from all engines, in any order.

    Returns:
        Lists of equal length: `seconds` since the first sample, a list for each of `COLUMNS`, and
        `gpu_secs`, the total time that engines on GPUs existed. If engines share a GPU, `used_mib`
        and `total_mib` count it once for each.
    """
    engines: dict[str, list[tuple[float, ...]]] = {}
    for pulse in pulses:
        engines.setdefault(pulse["engine"], []).extend(map(tuple, pulse["samples"]))
    if not engines:
        return {name: [] for name in ("seconds", *COLUMNS, GPU_SECS)}
    tables = [np.array(sorted(samples)) for samples in engines.values()]
    first, last = min(t[0, 0] for t in tables), max(t[-1, 0] for t in tables)
    num_steps = min(max(1, math.floor((last - first) / MIN_SECS)), MAX_STEPS)
    times = np.linspace(first, last, num_steps + 1)
    totals = {
        name: sum(np.interp(times, t[:, 0], t[:, i]) for t in tables)
        for i, name in enumerate(COLUMNS, start=1)
    }
    of_gpus = [t for t in tables if t[-1, 1 + COLUMNS.index("total_mib")]]
    totals[GPU_SECS] = sum((times.clip(t[0, 0], t[-1, 0]) - t[0, 0] for t in of_gpus), 0 * times)
    return {
        "seconds": np.round(times - first, 3).tolist(),
        **{name: _rounded(name, total).tolist() for name, total in totals.items()},
    }


def _rounded(name: str, totals: np.ndarray) -> np.ndarray:
    return np.round(totals, 3) if name.endswith("_secs") else np.rint(totals).astype(int)
