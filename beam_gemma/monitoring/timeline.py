"""The pulse of an engine: how much it has done at which time, in few enough samples to carry along.

A sample holds totals since the engine started, so that one that gets lost costs nothing but detail.
Samples of engines on several machines become one timeline.
"""

import functools
import json
import math
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

PULSE = b"beam_gemma.pulse"
"""Key of the samples in the metadata of a batch of results."""
MIN_SECS = 1.0
"""Between two samples, and of a step of a timeline."""
SAMPLES_PER_SPAN = 256
"""Samples are never nearer than one part in so many of the time that has gone by: of a day there
are about 1,800."""
MAX_STEPS = 256
"""Of a timeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceStats:
    """What a GPU says of itself and of what it has done for a session since that was loaded.

    All are zero on a CPU.
    """

    busy_secs: float = 0.0
    """In which it ran steps."""
    steps: int = 0
    replays: int = 0
    """Of these steps, those that repeated a captured graph."""
    graphs: int = 0
    """Captured."""
    used_mib: int = 0
    """Of its memory, by whomever."""
    total_mib: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What an engine has done since it started."""

    prompt_tokens: int = 0
    """Computed, so neither those that a cache held nor those of rows that share a request."""
    cached_tokens: int = 0
    """Of prompts, not computed because a cache held them."""
    completion_tokens: int = 0
    used_slots: int = 0
    """Of all decode steps, those with a sequence in them; in steps over whole texts, tokens."""
    slots: int = 0
    used_cache: int = 0
    """Of all steps, the cache that sequences held, in blocks of one layer."""
    cache: int = 0
    """The same of what they could hold."""

    def __add__(self, other: "Work") -> "Work":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)}
        return Work(**sums)


COLUMNS = tuple(field.name for kind in (Work, DeviceStats) for field in fields(kind))
"""Of a sample, behind its time."""
GPU_SECS = "gpu_secs"


class Pulse:
    """Samples of one engine, of which each is given once."""

    def __init__(
        self,
        device: str,
        *,
        stats: Callable[[], DeviceStats] = DeviceStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing done.

        Args:
            device: Where the engine runs: `cpu` or `cuda`.
            stats: What the device says, asked by the thread that has run a step.
            clock: Seconds that only grow.
        """
        self._engine = uuid.uuid4().hex
        self._device = device
        self._read_stats = stats
        self._clock = clock
        self._started = clock()
        self._since_epoch = time.time() - self._started
        self._lock = threading.Lock()  # guards what follows
        self._work = Work()
        self._stats = DeviceStats()
        self._first_row_secs: float | None = None
        self._samples: list[tuple[float, ...]] = []
        self._sample(self._started)

    def add(self, work: Work) -> None:
        """Add what a step has done, and take a sample if one is due; from any thread."""
        now, stats = self._clock(), self._read_stats()
        with self._lock:
            self._work += work
            self._stats = stats
            if now >= self._due:
                self._sample(now)

    def note_first_row(self, secs: float) -> None:
        """Note how many seconds after the start of its process the engine had its first row."""
        with self._lock:
            self._first_row_secs = secs

    def counts(self) -> Counter[str]:
        """Return what Beam counts of caches and devices, since the engine started."""
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
        """Return the samples since this was last called and one of now, as JSON holds them."""
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


def with_pulse(results: pa.RecordBatch, pulse: Mapping[str, Any]) -> pa.RecordBatch:
    """Return a batch that carries samples along."""
    metadata = results.schema.metadata or {}
    return results.replace_schema_metadata({**metadata, PULSE: json.dumps(pulse)})


def pulse_of(results: pa.RecordBatch) -> dict[str, Any] | None:
    """Return the samples that a batch carries, if any."""
    carried = (results.schema.metadata or {}).get(PULSE)
    return None if carried is None else json.loads(carried)


def used_mib(pulse: Mapping[str, Any]) -> int | None:
    """Return how much of a GPU's memory was in use when samples were taken; None for a CPU."""
    last = dict(zip(COLUMNS, pulse["samples"][-1][1:], strict=True))
    return last["used_mib"] if last["total_mib"] else None


def timeline(pulses: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return what all engines together had done at even steps of time.

    Args:
        pulses: What `take` of each engine has returned, in any order.

    Returns:
        Lists of one length: `seconds` since the first sample, a list for each of `COLUMNS`, and
        `gpu_secs`, the time that all GPUs together had an engine. Where a GPU has several engines,
        `used_mib` and `total_mib` count it as often.
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


@functools.cache
def processor_of(device: str) -> str:
    """Return the name of a device of this machine, and of a CPU the number of its cores."""
    if device == "cuda":
        files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        return next((name for file in files if (name := _entry(file, "Model"))), "CUDA device")
    name = _entry(Path("/proc/cpuinfo"), "model name") or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _entry(file: Path, key: str) -> str | None:
    """Return the value of the first line `key : value` of a file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
