"""Counts of an engine that many callers share: each is given once, to whoever asks first."""

import dataclasses
import threading
from collections import Counter
from typing import Protocol, runtime_checkable

from beam_gemma.monitoring.timeline import Pulse


@dataclasses.dataclass(slots=True)
class EngineStats:
    """Counts since the engine started."""

    max_num_seqs: int
    num_requests: int = 0
    """Submitted."""
    num_finished: int = 0
    """Of these, failed ones included."""
    num_failed: int = 0
    num_prefill_steps: int = 0
    """With part of a prompt, whatever else runs beside it."""
    num_decode_steps: int = 0
    """With one token of each sequence."""
    num_prompt_tokens: int = 0
    """Computed by prefill; again after a preemption."""
    num_cached_tokens: int = 0
    """Of prompts, not computed because the cache had them; again after a preemption."""
    num_completion_tokens: int = 0
    """Chosen, end tokens included."""
    num_preemptions: int = 0
    """Sequences put back to make room, or after a failure, and computed again."""
    num_decode_rows: int = 0
    """Sequences of all decode steps."""
    num_backlog_decode_steps: int = 0
    """Decode steps while other requests waited."""
    num_backlog_decode_rows: int = 0
    """Sequences of those steps."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, of prompts and of completions."""
        return self.num_prompt_tokens + self.num_completion_tokens

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that a decode step used."""
        return self.num_decode_rows / max(1, self.num_decode_steps * self.max_num_seqs)

    @property
    def backlog_occupancy(self) -> float:
        """The same while other requests waited: what the end of the work has no part in."""
        num_slots = self.num_backlog_decode_steps * self.max_num_seqs
        return self.num_backlog_decode_rows / max(1, num_slots)


@runtime_checkable
class Counted(Protocol):
    """An engine, as far as its counts go."""

    pulse: Pulse

    @property
    def stats(self) -> EngineStats:
        """The engine's counts so far."""


class Tally:
    """What an engine has counted and nobody has been told yet."""

    def __init__(self, engine: Counted) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()  # guarded by the lock

    def take(self) -> dict[str, int]:
        """Return the counts since this was last called, without those that are zero."""
        with self._lock:
            totals = _counts(self._engine.stats) + self._engine.pulse.counts()
            new = totals - self._taken
            self._taken = totals
        return dict(new)


def _counts(stats: EngineStats) -> Counter[str]:
    return Counter(
        decode_rows=stats.num_decode_rows,
        decode_slots=stats.num_decode_steps * stats.max_num_seqs,
        backlog_decode_rows=stats.num_backlog_decode_rows,
        backlog_decode_slots=stats.num_backlog_decode_steps * stats.max_num_seqs,
        cached_tokens=stats.num_cached_tokens,
        preemptions=stats.num_preemptions,
    )
