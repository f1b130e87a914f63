"""A session that works behind the engine's back: a started step runs when its result is asked for.

Until then everything that the step names must stay as it was, so it looks at it then: blocks must
have holders, slots must be taken, the arrays must hold what they held. What prefill has written
differs from what decode has, as the bits of two kernels do, so a token that was computed the other
way changes everything after it.
"""

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from beam_gemma.engine.kv_cache import KVCache
from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.signature import PREFILL_ROWS, Signature
from beam_gemma.runtime.step_interface import StepOutput
from tests.doubles.fakes import FakeSession

DECODED = 100
"""Added to what decode writes; above all tokens."""


class AsyncSession(FakeSession):
    """Keeps a queue of started steps and blocks to zero, as a stream does."""

    cache: KVCache
    """The engine's; to be set before the first step."""

    def __init__(self, signature: Signature, *, depth: int = 2, **options) -> None:
        super().__init__(signature, **options)
        self.max_steps_in_flight = depth
        self.deepest = 0
        """Most steps that were in flight at once."""
        self.num_surplus = 0
        self.fails_to_start: Callable[[int], bool] = lambda _: False
        """Whether a step cannot be started, by its number (from 1)."""
        self._num_started = 0
        self._queue: deque[Callable[[], None]] = deque()
        self._in_flight: list[LateStep] = []

    def start(self, feeds, *, with_logits=False, with_candidates=True):
        assert self.go.wait(timeout=200)
        self._num_started += 1
        try:
            self._check_start(feeds)
        except AssertionError as fault:
            self.faults.append(fault)
            raise
        if self.fails_to_start(self._num_started):
            raise RuntimeError("no room")
        step = LateStep(self, feeds, with_logits=with_logits, with_candidates=with_candidates)
        self._queue.append(step.run)
        self._in_flight.append(step)
        self.deepest = max(self.deepest, len(self._in_flight))
        return step

    def zero_blocks(self, group, blocks):
        blocks = list(blocks)
        self._queue.append(lambda: super(AsyncSession, self).zero_blocks(group, blocks))

    def copy_slot(self, source, target):
        self._queue.append(lambda: super(AsyncSession, self).copy_slot(source, target))

    def finish(self, step: "LateStep") -> None:
        """Do all that was queued up to a step; its failure is that of what follows in flight."""
        while not step.is_over:
            self._queue.popleft()()
        self._in_flight.remove(step)

    def doom(self, failed: "LateStep", error: Exception) -> None:
        """Have what was started after a step that failed fail as well."""
        for step in self._in_flight[self._in_flight.index(failed) + 1 :]:
            step.error = step.error or error

    def _check_start(self, feeds: Mapping[str, np.ndarray]) -> None:
        assert len(self._in_flight) < self.max_steps_in_flight
        for step in self._in_flight:
            assert not len(step.feeds.get("full_rows", ())), "the host has not chosen yet"
        new = np.diff(feeds["cu_seqlens"])
        if feeds["attention_metadata"][0] == 1:
            assert (new == 1).all()
        else:
            assert len(new) <= PREFILL_ROWS
            assert len(feeds["logit_rows"]) <= PREFILL_ROWS
            assert (feeds.get("token_slots", np.array([-1])) == -1).all()

    def check_held(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Check that nobody has given away what a step needs."""
        for state in self.signature.paged_states:
            pool = self.cache._groups[state.group].pool
            table = feeds[f"block_table.{state.group}"]
            for row, past in zip(table.tolist(), feeds["past_seqlens"].tolist(), strict=True):
                reach = past if state.sliding_window is None else state.sliding_window - 1
                first = max(0, past - reach) // self.signature.block_size
                for block in set(row[first:]) - {0}:
                    assert pool.num_holders(block), "a block is free that a step in flight needs"
        free = set(self.cache._free_slots)
        slots = np.concatenate([feeds["logit_slots"], feeds["token_slots"]])
        assert not free & set(slots.tolist()), "a slot is free that a step in flight needs"

    def _write(self, state: PagedState, feeds: Mapping[str, np.ndarray]) -> None:
        super()._write(state, feeds)
        if feeds["attention_metadata"][0] == 1:
            self._cache[state.group][feeds[f"slot_mapping.{state.group}"]] += DECODED


class LateStep:
    """A step in flight."""

    def __init__(self, session, feeds, *, with_logits, with_candidates):
        self.feeds = feeds
        self.is_over = False
        self.error = None
        self._session = session
        self._options = {"with_logits": with_logits, "with_candidates": with_candidates}
        self._before = {name: array.copy() for name, array in feeds.items()}
        self._output = None

    def run(self):
        self.is_over = True
        session = self._session
        try:
            for name, array in self._before.items():
                np.testing.assert_array_equal(self.feeds[name], array)
            session.check_held(self.feeds)
            if self.error is not None:
                session._spoil(self.feeds)
                return
            self._output = FakeSession.start(session, self.feeds, **self._options).output
            assert isinstance(self._output, StepOutput)
        except AssertionError as fault:
            session.faults.append(fault)
            self.error = fault
        except RuntimeError as error:
            self.error = error
            session.doom(self, error)

    def result(self):
        self._session.finish(self)
        if self.error is not None:
            raise self.error
        return self._output
