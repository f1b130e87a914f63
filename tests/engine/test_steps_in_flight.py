"""Two steps in flight: every request completes as with one at a time, and all is given back."""

import functools
import itertools
from contextlib import closing

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.async_session import AsyncSession
from tests.doubles.fakes import RAREST, STATES, FakeSession, expected, fake_signature

SIGNATURE = fake_signature(device="cuda", states=STATES[:2], optional_inputs=())
EOS = (5,)
BAD = RAREST
KINDS = (
    {},
    {"ignore_eos": True},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0},  # the host draws
    {"stop_token_ids": tuple(range(30))},
)
ROW = st.tuples(
    st.sampled_from([1, 15, 16, 17, 40, 90, 150]),
    st.integers(1, 40),
    st.sampled_from([0, 0, 32, 70]),
    st.sampled_from(range(len(KINDS))),
)


@functools.cache
def make_request(length, max_tokens, common, kind, *, bad_at=None):
    """Return a row that starts like others do."""
    shared = np.random.default_rng(1).integers(1, RAREST, 150)[: min(common, length - 1)].tolist()
    own = np.random.default_rng((length, max_tokens, kind)).integers(1, RAREST, length)
    ids = shared + own[len(shared) :].tolist()
    if bad_at is not None:
        ids[bad_at % length] = BAD
    return Request(
        request_id=f"{length}-{max_tokens}-{kind}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, **KINDS[kind]),
        sampling_key=f"row {max_tokens}",
        logprob=kind != 1,
    )


def run(session, batches, **config):
    """Return the completions of batches that are submitted one after another, and the counts."""
    engine = Engine(session, EngineConfig(eos_token_ids=EOS, **config))
    session.cache = engine._cache
    with closing(engine):
        futures = [future for batch in batches for future in engine.submit(batch)]
        completions = [future.result(timeout=200) for future in futures]
    assert session.faults == []
    cache = engine._cache
    assert cache.num_free_slots == cache.num_slots == config["max_num_seqs"]
    for group, count in session.num_blocks.items():
        assert cache.num_free_blocks(group) == count - 1
    return completions, engine.stats


@functools.cache
def alone(request):
    """Return what a row completes to by itself, one step at a time."""
    session = AsyncSession(SIGNATURE, depth=1)
    config = {"max_num_seqs": 1, "max_num_batched_tokens": 500, "enable_prefix_caching": False}
    [completion], _ = run(session, [[request]], **config)
    assert session.deepest == 1
    return completion


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=9, unique=True),
    cuts=st.lists(st.integers(0, 9), max_size=2),
    bad=st.dictionaries(st.integers(0, 8), st.integers(0, 200), max_size=2),
    failure=st.sampled_from(
        ["none", "none", "start", "result", "raises", "nan full", "nan sliding"]
    ),
    often=st.integers(3, 9),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(16, 200),
    num_blocks=st.integers(14, 60),
    enable_prefix_caching=st.sampled_from([True, True, False]),
)
def test_every_row_completes_as_it_does_alone(
    rows,
    cuts,
    bad,
    failure,
    often,
    max_num_seqs,
    budget,
    num_blocks,
    enable_prefix_caching,
):
    """Whatever arrives when, ends where, fails how, and however small the cache is."""
    bad = bad if failure in ("raises", "nan full", "nan sliding") else {}
    requests = [make_request(*row, bad_at=bad.get(i)) for i, row in enumerate(rows)]
    poison = (failure.split()[1], BAD) if failure.startswith("nan") else None
    session = AsyncSession(SIGNATURE, num_blocks=num_blocks, poison=poison)
    if failure == "start":
        session.fails_to_start = lambda number: number % often == 0
    elif failure == "result":
        session.fails = lambda number, _: number % often == 0
    elif failure == "raises":
        session.fails = lambda _, ids: BAD in ids
    borders = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    batches = [requests[start:end] for start, end in itertools.pairwise(borders)]
    completions, stats = run(
        session,
        batches,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    for completion, request in zip(completions, requests, strict=True):
        if BAD in request.prompt_token_ids:
            assert completion.finish_reason == "error"
        else:
            assert completion == alone(request)
    assert session.deepest <= 2
    if not bad:
        # A token that ends a completion is chosen, and no part of it.
        chosen = sum(len(c.token_ids) + (c.finish_reason == "stop") for c in completions)
        assert stats.num_completion_tokens == chosen
    assert stats.num_finished == stats.num_requests == len(requests)


def test_two_steps_are_in_flight_and_completions_are_those_of_the_definition():
    """With a session whose prefill and decode have the same bits, as the CPU's have."""
    requests = [make_request(length, 30, 0, kind) for length in (20, 40) for kind in (0, 1, 2, 4)]
    session = AsyncSession(SIGNATURE)
    session._write = lambda state, feeds: FakeSession._write(session, state, feeds)
    completions, stats = run(session, [requests], max_num_seqs=4, max_num_batched_tokens=100)
    assert session.deepest == 2
    for completion, request in zip(completions, requests, strict=True):
        right = expected(SIGNATURE, request, eos_token_ids=EOS)
        assert completion.token_ids == right.token_ids
        assert completion.finish_reason == right.finish_reason
    assert stats.num_prompt_tokens + stats.num_cached_tokens == 4 * (20 + 40)


def test_a_row_that_the_host_chooses_for_leaves_the_others_as_they_are():
    requests = [make_request(20, 30, 0, kind) for kind in (0, 3, 2)]
    session = AsyncSession(SIGNATURE)
    completions, _ = run(session, [requests], max_num_seqs=4, max_num_batched_tokens=100)
    assert completions == [alone(request) for request in requests]


def test_occupancy_leaves_out_rows_of_surplus_steps():
    """Two rows end by their first decoded token, which is in the next step as well."""
    token_at = {21: 30, 22: EOS[0]}
    session = AsyncSession(SIGNATURE, next_token=lambda ids: token_at.get(len(ids), 30))
    requests = [make_request(20, 30, 0, 0), make_request(20, 29, 0, 0)]
    completions, stats = run(session, [requests], max_num_seqs=2, max_num_batched_tokens=100)
    assert [len(completion.token_ids) for completion in completions] == [2, 2]
    assert (stats.num_decode_rows, stats.num_completion_tokens) == (4, 6)
    assert len(session.steps) == 4, "with one surplus step"
    assert stats.num_decode_steps == 3
