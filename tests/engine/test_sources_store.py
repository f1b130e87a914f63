"""The store of encoder states: what it computes, in which steps, and what it keeps."""

import pytest

from beam_gemma.engine.sequence import Sequence
from beam_gemma.engine.source_store import SourceStore
from beam_gemma.errors import DeviceError
from tests.doubles.fake_sources import FakeSourceEncoder
from tests.engine.test_sources_steps import make_request


def make_store(max_bytes, budget=100):
    encoder = FakeSourceEncoder()
    return encoder, SourceStore(encoder, max_num_batched_tokens=budget, max_bytes=max_bytes)


def sequence_of(num_source_tokens, seed=1):
    return Sequence(make_request(num_source_tokens, seed=seed), frozenset())


def test_the_store_keeps_what_was_needed_last_up_to_its_limit():
    encoder, store = make_store(max_bytes=3 * 10 * 8 * 4)
    rows = [sequence_of(10, seed) for seed in range(4)]
    for row in (*rows[:3], rows[0], rows[3], rows[0], rows[1]):
        [states] = store.prepare([row]).values()
        assert states.shape == (10, 8)
        assert store.num_bytes <= 3 * 10 * 8 * 4
    assert encoder.steps == [[10]] * 5, "the second went first, since the first was needed again"
    assert (store.num_computed, store.num_reused) == (5, 2)
    assert store.take_num_new_tokens() == 50
    assert store.take_num_new_tokens() == 0
    assert len(store.prepare(rows)) == 4, "a step has all that it needs"
    store.prepare(rows[:1])
    assert store.num_bytes <= 3 * 10 * 8 * 4


def test_the_store_reads_longest_sources_first_and_a_long_one_alone():
    encoder, store = make_store(max_bytes=1 << 20)
    rows = [sequence_of(n, n) for n in (5, 30, 250, 60, 6, 5)]
    states = store.prepare(rows)
    assert encoder.steps == [[250], [60, 30, 6], [5]]
    assert {digest: len(one) for digest, one in states.items()} == {
        row.source_digest: row.num_source_tokens for row in rows
    }


def test_a_failed_step_of_the_encoder_keeps_the_sources_before_it():
    encoder, store = make_store(max_bytes=1 << 20)
    encoder.fails = lambda step, _: step == 2
    rows = [sequence_of(90, 1), sequence_of(80, 2)]
    with pytest.raises(DeviceError, match="1 sources of 80 tokens"):
        store.prepare(rows)
    assert (store.num_computed, store.num_reused) == (0, 0)
    store.prepare(rows)
    assert encoder.steps == [[90], [80], [80]]
