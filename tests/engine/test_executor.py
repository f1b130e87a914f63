"""Failures inside a step: only the rows at fault end, and the rest completes as if alone."""

from concurrent.futures import Future
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import EngineError
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.fakes import RAREST, STATES, FakeSession, expected, fake_signature

PAGED = STATES[:2]
BAD = RAREST
"""A token that no other row has and that is never chosen."""


def make_request(length, seed=0, *, common=0, bad_at=None, max_tokens=8):
    """Return a row that starts like all others do, with one bad token perhaps."""
    shared = np.random.default_rng(1).integers(1, RAREST, common).tolist()
    own = np.random.default_rng((length, seed)).integers(1, RAREST, length - common).tolist()
    ids = shared + own
    if bad_at is not None:
        ids[bad_at] = BAD
    return Request(
        request_id=f"{length}-{seed}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens),
        sampling_key=f"row {seed}",
    )


def is_bad(request):
    return BAD in request.prompt_token_ids


def run(session, requests, **config):
    """Return each request's completion or the engine's error, and check what is left behind."""
    with closing(Engine(session, EngineConfig(**config))) as engine:
        futures = engine.submit(requests)
        results = [result_of(future) for future in futures]
        cache = engine._scheduler._cache
        stats = engine.stats
    assert session.faults == []
    if not any(isinstance(result, EngineError) for result in results):
        assert cache.num_free_slots == config["max_num_seqs"]
        for group, count in session.num_blocks.items():
            assert cache.num_free_blocks(group) == count - 1
        assert stats.num_finished == len(requests)
    return results, stats


def result_of(future: Future):
    error = future.exception(timeout=200)
    return future.result() if error is None else error


def assert_as_expected(completion, request, signature):
    right = expected(signature, request)
    assert completion == right


def fails_with_bad(_, ids):
    return BAD in ids


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(41, 150), st.integers(0, 3), st.sampled_from([0, 40])),
        min_size=1,
        max_size=7,
    ),
    bad=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=2),
    failure=st.sampled_from(
        ["none", "raises", "nan full", "nan sliding", "memory", "now and then"]
    ),
    device=st.sampled_from(["cpu", "cuda"]),
    states=st.sampled_from([PAGED, PAGED, STATES]),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(16, 200),
    num_blocks=st.integers(24, 60),
    enable_prefix_caching=st.sampled_from([True, True, False]),
)
def test_rows_complete_as_if_alone_whatever_step_fails(
    rows, bad, failure, device, states, max_num_seqs, budget, num_blocks, enable_prefix_caching
):
    bad_at = dict(bad)
    requests = [
        make_request(length, seed, common=common, bad_at=bad_at.get(i), max_tokens=1 + seed * 9)
        for i, (length, seed, common) in enumerate(rows)
    ]
    poison = (failure.split()[1], BAD) if failure.startswith("nan") else None
    session = FakeSession(
        fake_signature(device=device, states=states), num_blocks=num_blocks, poison=poison
    )
    most = 16 if states is PAGED else budget
    # A row with a state begins anew, in up to 38 steps, and must not fail a second time.
    often = 5 if states is PAGED else 60
    session.fails = {
        "raises": fails_with_bad,
        "memory": lambda _, ids: len(ids) > most,
        "now and then": lambda step, _: step % often == 0,
    }.get(failure, session.fails)
    results, _ = run(
        session,
        requests,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    for result, request in zip(results, requests, strict=True):
        if is_bad(request) and failure in ("raises", "nan full", "nan sliding"):
            assert result.finish_reason == "error"
            assert ("NaN" in result.error) == (poison is not None)
        else:
            assert_as_expected(result, request, session.signature)


@pytest.mark.parametrize("states", [PAGED, STATES])
def test_a_row_that_raises_ends_alone(states):
    session = FakeSession(fake_signature(states=states))
    session.fails = fails_with_bad
    requests = [make_request(60, seed, bad_at=30 if seed == 5 else None) for seed in range(9)]
    results, stats = run(session, requests, max_num_seqs=8)
    assert results[5].error == "model: step failed: RuntimeError: the device is gone"
    assert results[5].token_ids == ()
    assert stats.num_failed == 1
    for seed in (0, 1, 2, 3, 4, 6, 7, 8):
        assert_as_expected(results[seed], requests[seed], session.signature)


def test_a_step_that_is_too_large_is_cut_and_every_row_completes():
    session = FakeSession(fake_signature(states=PAGED))
    session.fails = lambda _, ids: len(ids) > 50
    requests = [make_request(length, max_tokens=20) for length in (300, 200, 100, 50, 49)]
    results, stats = run(session, requests, max_num_seqs=8, max_num_batched_tokens=400)
    for result, request in zip(results, requests, strict=True):
        assert_as_expected(result, request, session.signature)
    assert stats.num_failed == stats.num_preemptions == 0
    assert stats.num_prompt_tokens == 699, "what failed does not count"


@pytest.mark.parametrize("states", [PAGED, STATES])
def test_a_step_that_fails_once_costs_no_row(states):
    for number in (1, 2, 5, 8):
        session = FakeSession(fake_signature(states=states))
        session.fails = lambda step, _, number=number: step == number
        requests = [make_request(40)]
        results, stats = run(session, requests, max_num_seqs=1)
        assert len(session.steps) > number, "the step did not fail"
        assert_as_expected(results[0], requests[0], session.signature)
        assert stats.num_failed == 0


def test_rows_that_share_blocks_of_a_failed_row_start_anew():
    """The first row is cut down to a block and fails for good; the others share its prefix."""
    session = FakeSession(fake_signature(states=PAGED))
    # All rows, two of them, the first alone, then 16, 8, 4, 2 and 1 of its blocks.
    session.fails = lambda step, _: step <= 8
    requests = [
        make_request(500 - seed, seed, common=480, max_tokens=9 - seed) for seed in range(4)
    ]
    results, stats = run(session, requests, max_num_seqs=4)
    assert "step failed" in results[0].error
    assert stats.num_preemptions == 3
    for result, request in zip(results[1:], requests[1:], strict=True):
        assert_as_expected(result, request, session.signature)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", ["full", "sliding"])
def test_a_nan_does_not_pass_through_shared_blocks(device, group):
    """What comes after a shared prefix in one row spoils the blocks of the prefix for all."""
    session = FakeSession(fake_signature(device=device, states=PAGED), poison=(group, BAD))
    spoiled = make_request(110, common=96, bad_at=100, max_tokens=30)
    others = [make_request(108, seed, common=96, max_tokens=20) for seed in range(5)]
    results, stats = run(session, [spoiled, *others], max_num_seqs=3)
    assert "NaN" in results[0].error
    for result, request in zip(results[1:], others, strict=True):
        assert_as_expected(result, request, session.signature)
    assert stats.num_cached_tokens > 0
    assert stats.num_preemptions > 0


def test_a_dead_device_fails_every_request_with_an_engine_error():
    for num_rows in (1, 2, 3, 20):
        session = FakeSession(fake_signature(states=PAGED))
        session.fails = lambda step, _: step > 1
        results, stats = run(
            session, [make_request(40, seed) for seed in range(num_rows)], max_num_seqs=4
        )
        assert all(isinstance(result, EngineError) for result in results)
        assert "RuntimeError: the device is gone" in str(results[0])
        assert isinstance(results[0].__cause__, RuntimeError)
        assert stats.num_failed == 0


@pytest.mark.parametrize("states", [PAGED, STATES])
def test_a_row_alone_is_at_fault_if_the_device_is_alive(states):
    session = FakeSession(fake_signature(states=states))
    session.fails = fails_with_bad
    results, stats = run(session, [make_request(40, bad_at=39)], max_num_seqs=1)
    assert "step failed" in results[0].error
    assert stats.num_requests == stats.num_finished == stats.num_failed == 1


def test_rows_at_fault_among_healthy_ones_never_stop_the_engine():
    """Far more of them than may fail in a row."""
    session = FakeSession(fake_signature(states=PAGED))
    session.fails = fails_with_bad
    requests = [make_request(60, seed, bad_at=9 if seed % 2 else None) for seed in range(40)]
    results, stats = run(session, requests, max_num_seqs=8)
    assert stats.num_failed == 20
    for result, request in zip(results[::2], requests[::2], strict=True):
        assert_as_expected(result, request, session.signature)


def test_a_fault_of_the_engine_itself_stops_it(monkeypatch):
    """What is not the session's is nobody's row error."""

    def broken(*_):
        raise KeyError("packing")

    monkeypatch.setattr("beam_gemma.engine.executor.pack", broken)
    with closing(Engine(FakeSession(), EngineConfig(max_num_seqs=2))) as engine:
        (future,) = engine.submit([make_request(9)])
        with pytest.raises(EngineError, match="KeyError: 'packing'"):
            future.result(timeout=200)
