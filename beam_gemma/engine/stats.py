"""Counts of an engine that many callers share; each count is reported once, to the first caller."""

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
    """Requests submitted."""
    num_finished: int = 0
    """Requests finished, failed ones included."""
    num_failed: int = 0
    num_prefill_steps: int = 0
    """Steps that compute part of a prompt, whatever else runs beside it."""
    num_decode_steps: int = 0
    """Steps without prompt tokens: they extend completions only."""
    num_prompt_tokens: int = 0
    """Prompt tokens computed by prefill, and source tokens by the encoder; counted again after a
    preemption."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache instead of computed; counted again after a preemption."""
    num_completion_tokens: int = 0
    """Tokens that completions gained: chosen ones, end tokens included, and forced ones."""
    num_preemptions: int = 0
    """Times a sequence was put back, to make room or after a failure, and computed again."""
    num_pictures: int = 0
    """Pictures whose embeddings were computed; counted again once they are kept no longer."""
    num_reused_pictures: int = 0
    """Pictures that steps needed and whose embeddings were kept, or shared within the step."""
    num_sounds: int = 0
    """Clips of sound whose embeddings were computed; counted again once they are kept no longer."""
    num_reused_sounds: int = 0
    """Clips that steps needed and whose embeddings were kept, or shared within the step."""
    num_sources: int = 0
    """Sources that the encoder has read; counted again once their states are kept no longer."""
    num_reused_sources: int = 0
    """Sources that rows needed and whose states were kept, or shared within the step."""
    num_decode_rows: int = 0
    """Sequences in decode steps, summed over the steps."""
    num_backlog_decode_steps: int = 0
    """Decode steps run while other requests waited."""
    num_backlog_decode_rows: int = 0
    """Sequences in those steps, summed over the steps."""

    @property
    def num_tokens(self) -> int:
        """Number of computed tokens of prompts and completions."""
        return self.num_prompt_tokens + self.num_completion_tokens

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that a decode step uses."""
        return self.num_decode_rows / max(1, self.num_decode_steps * self.max_num_seqs)

    @property
    def backlog_occupancy(self) -> float:
        """Occupancy while other requests wait, so that the end of the work does not lower it."""
        num_slots = self.num_backlog_decode_steps * self.max_num_seqs
        return self.num_backlog_decode_rows / max(1, num_slots)


@runtime_checkable
class Counted(Protocol):
    """Interface of an engine to its counts."""

    pulse: Pulse

    @property
    def stats(self) -> EngineStats:
        """The engine's counts so far."""


class Tally:
    """Counts of an engine that no caller has taken yet."""

    def __init__(self, engine: Counted) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()  # guarded by the lock

    def take(self) -> dict[str, int]:
        """Return the counts since the last call, without those that are zero."""
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
        pictures=stats.num_pictures,
        reused_pictures=stats.num_reused_pictures,
        sounds=stats.num_sounds,
        reused_sounds=stats.num_reused_sounds,
        sources=stats.num_sources,
        reused_sources=stats.num_reused_sources,
    )
