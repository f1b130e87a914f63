"""Counts of an engine that many callers share: each is given once, to whoever asks first."""

import threading
from collections import Counter

from beam_gemma.engine.engine import Engine, EngineStats


class Tally:
    """What an engine has counted and nobody has been told yet."""

    def __init__(self, engine: Engine) -> None:
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
