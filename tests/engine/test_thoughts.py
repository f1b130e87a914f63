"""Thoughts: each ends within its limit, the answer has all of its own, and no row tells of others.

A thought begins and ends with tokens that a fake model chooses at random, so it may come anywhere,
never end, or begin where nothing of its limit is left.
"""

import functools
import hashlib
import itertools
import math
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.engine.thoughts import Thinking, Thoughts
from beam_gemma.errors import OptionsError
from beam_gemma.runtime.limits import EngineConfig
from tests.doubles.async_session import AsyncSession
from tests.doubles.fakes import (
    RAREST,
    STATES,
    VOCAB_SIZE,
    FakeSession,
    fake_signature,
    histories_of,
    logits_of,
    logsumexp,
)

EOS, BEGIN, END = 5, 6, 7
CPU = fake_signature(states=STATES[:2], optional_inputs=())
CUDA = fake_signature(device="cuda", states=STATES[:2], optional_inputs=())
LIMITS = (None, 0, 2, 3, 4, 7, 20)


def fickle(tokens):
    """Return a token after others: often one that begins or ends a thought, seldom the end."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=4).digest()
    common = (BEGIN, BEGIN, BEGIN, END, EOS, *range(20, 27))
    return common[int.from_bytes(digest, "little") % len(common)]


def make_request(number, *, max_tokens, limit, is_begun=False, length=20, **params):
    ids = np.random.default_rng(number).integers(20, RAREST, length).tolist()
    return Request(
        request_id=f"row {number}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, **params),
        sampling_key=f"row {number}",
        thinking=Thinking(begin_id=BEGIN, end_id=END, max_tokens=limit, is_begun=is_begun),
        logprob=True,
    )


def run(session, requests, **config):
    """Return the completions of requests, after which the engine holds nothing."""
    engine = Engine(session, EngineConfig(eos_token_ids=(EOS,), **config))
    session.cache = engine._cache
    with closing(engine):
        completions = engine.generate(requests)
    assert session.faults == []
    for group, count in session.num_blocks.items():
        assert engine._cache.num_free_blocks(group) == count - 1
    return completions, engine.stats


def by_definition(request, next_token=fickle):
    """Return the tokens of a greedy request, why they end, and the logprob of the answer."""
    limit = request.thinking.max_tokens
    ids, start = list(request.prompt_token_ids), len(request.prompt_token_ids)
    is_open, num_thought, num_answer, logprob = request.thinking.is_begun, 0, 0, 0.0
    if is_open and limit == 0:
        ids.append(END)
        is_open, num_answer = False, 1
    while num_answer < request.params.max_tokens:
        logits = logits_of(histories_of(CPU, ids, []), 0, VOCAB_SIZE, next_token)
        token = int(logits.argmax())
        if not is_open and token != BEGIN:
            logprob += float(logits[token] - logsumexp(logits[None])[0])
        if token == EOS:
            return ids[start:], "stop", logprob
        ids.append(token)
        begins = not is_open and token == BEGIN
        belongs = num_thought < (limit or 0) and (is_open or begins)
        num_thought += belongs
        num_answer += not belongs
        is_open = begins or (is_open and token != END)
        is_spent = limit is not None and num_thought >= limit - 1
        if is_open and is_spent and (num_thought < limit or num_answer < request.params.max_tokens):
            ids.append(END)
            num_answer += num_thought >= limit
            num_thought += num_thought < limit
            is_open = False
    return ids[start:], "length", logprob


ROW = st.tuples(
    st.integers(1, 12),
    st.sampled_from(LIMITS),
    st.booleans(),
    st.sampled_from([5, 16, 17, 40]),
)


@settings(max_examples=50)
@given(rows=st.lists(ROW, min_size=1, max_size=7), num_blocks=st.integers(9, 60))
def test_thoughts_end_by_the_definition_in_any_company(rows, num_blocks):
    requests = [
        make_request(i, max_tokens=most, limit=limit, is_begun=is_begun, length=length)
        for i, (most, limit, is_begun, length) in enumerate(rows)
    ]
    session = FakeSession(CPU, num_blocks=num_blocks, next_token=fickle)
    completions, stats = run(session, requests, max_num_seqs=3, max_num_batched_tokens=60)
    for completion, request in zip(completions, requests, strict=True):
        token_ids, finish_reason, logprob = by_definition(request)
        assert list(completion.token_ids) == token_ids
        assert completion.finish_reason == finish_reason
        # float64 sums of at most 12 logarithms of float32 probabilities
        assert math.isclose(completion.logprob, logprob, abs_tol=1e-4)
        assert len(token_ids) <= request.max_new_tokens
    assert stats.num_finished == len(requests)


@pytest.mark.parametrize("limit", [0, 2, 6])
def test_logprob_is_that_of_the_answer(limit):
    """Tokens of this model are likely by a few percent only, those of the thought too."""
    request = make_request(3, max_tokens=5, limit=limit, is_begun=True)
    [completion], _ = run(FakeSession(CPU), [request], max_num_seqs=1)
    token_ids, _, logprob = by_definition(request, next_token=None)
    assert list(completion.token_ids) == token_ids
    assert token_ids[max(limit - 1, 0)] == END
    assert logprob < -3
    # float64 sums of at most 5 logarithms of float32 probabilities
    assert math.isclose(completion.logprob, logprob, abs_tol=1e-5)


@functools.cache
def alone(row):
    """Return what a row completes to by itself, one step at a time."""
    session = AsyncSession(CUDA, depth=1, next_token=fickle)
    [completion], _ = run(session, [request_of(row)], max_num_seqs=1, max_num_batched_tokens=500)
    return completion


@functools.cache
def request_of(row):
    number, (max_tokens, limit, is_begun, length), kind = row
    params = ({}, {"temperature": 8.0, "top_k": 20}, {"temperature": 8.0})[kind]
    return make_request(
        number, max_tokens=max_tokens, limit=limit, is_begun=is_begun, length=length, **params
    )


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 99), ROW, st.integers(0, 2)), min_size=1, max_size=7),
    num_blocks=st.integers(9, 60),
    often=st.integers(3, 12),
    failure=st.sampled_from(["none", "none", "start", "result"]),
    enable_prefix_caching=st.booleans(),
)
def test_steps_in_flight_preemption_and_failures_change_no_thought(
    rows, num_blocks, often, failure, enable_prefix_caching
):
    """With a session whose prefill and decode have other bits, as those of CUDA have."""
    session = AsyncSession(CUDA, num_blocks=num_blocks, next_token=fickle)
    if failure == "start":
        session.fails_to_start = lambda number: number % often == 0
    elif failure == "result":
        session.fails = lambda number, _: number % often == 0
    completions, _ = run(
        session,
        list(map(request_of, rows)),
        max_num_seqs=3,
        max_num_batched_tokens=60,
        enable_prefix_caching=enable_prefix_caching,
    )
    assert completions == [alone(row) for row in rows]


def thinks_on(tokens):
    """Return a token of a thought that never ends, or of the answer after its end."""
    if tokens[-1] == END or 30 in tokens[20:]:
        return 30
    return 40 if len(tokens) > 20 else BEGIN


def test_the_device_runs_ahead_of_thoughts_and_one_choice_is_void():
    requests = [make_request(i, max_tokens=6, limit=9) for i in range(2)]
    session = AsyncSession(CUDA, next_token=thinks_on)
    # Prefill and decode have the same bits here, so that the script reads its tokens.
    session._write = lambda state, feeds: FakeSession._write(session, state, feeds)
    completions, stats = run(session, requests, max_num_seqs=2, max_num_batched_tokens=100)
    assert session.deepest == 2
    for completion in completions:
        assert completion.token_ids == (BEGIN, *[40] * 7, END, *[30] * 6)
        assert completion.finish_reason == "length"
    # The last token of a completion is never computed, the token of the void choice once.
    assert [sum(n for _, n in step) for step in session.steps] == [40, *[2] * 14]
    assert stats.num_completion_tokens == 2 * 15


def test_on_the_cpu_the_forced_end_runs_with_the_token_before_it():
    [completion], session = run_script(limit=9)
    assert completion.token_ids == (BEGIN, *[40] * 7, END, *[30] * 6)
    assert [n for step in session.steps for _, n in step] == [20, *[1] * 7, 2, *[1] * 5]


def run_script(**thinking):
    session = FakeSession(CPU, next_token=thinks_on)
    completions, _ = run(session, [make_request(0, max_tokens=6, **thinking)], max_num_seqs=1)
    return completions, session


@pytest.mark.parametrize(
    ("limit", "token_ids"),
    [
        (None, (BEGIN, *[40] * 5)),
        (0, (BEGIN, END, *[30] * 4)),
        (2, (BEGIN, END, *[30] * 6)),
        (3, (BEGIN, 40, END, *[30] * 6)),
    ],
)
def test_with_a_limit_the_answer_has_all_of_its_tokens(limit, token_ids):
    [completion], _ = run_script(limit=limit)
    assert completion.token_ids == token_ids


def test_stop_callbacks_hear_of_the_answer_alone():
    heard = []
    session = FakeSession(CPU, next_token=thinks_on)
    request = make_request(0, max_tokens=6, limit=5)
    object.__setattr__(request, "should_stop", lambda i: heard.append(i) or len(heard) == 3)
    [completion], _ = run(session, [request], max_num_seqs=1)
    assert heard == [30, 30, 30]
    assert completion.token_ids == (BEGIN, 40, 40, 40, END, 30, 30, 30)
    assert completion.finish_reason == "stop"


def test_an_end_token_within_a_thought_ends_the_completion():
    session = FakeSession(CPU, next_token=lambda ids: (BEGIN, 40, EOS)[len(ids) - 20])
    [completion], _ = run(session, [make_request(0, max_tokens=6, limit=9)], max_num_seqs=1)
    assert (completion.token_ids, completion.finish_reason) == ((BEGIN, 40), "stop")


def test_a_request_has_room_for_thought_and_answer_together():
    fits, too_long = (make_request(0, max_tokens=30, limit=50, length=n) for n in (920, 921))
    session = FakeSession(CPU, next_token=thinks_on)
    completions, _ = run(session, [fits, too_long], max_num_seqs=2)
    assert completions[0].error is None
    assert "with max_tokens 30 and thinking_tokens 50: expected at most 1,000" in (
        completions[1].error
    )


def test_rows_with_the_longest_thoughts_start_first():
    requests = [make_request(i, max_tokens=6, limit=limit) for i, limit in enumerate((0, 4, 20))]
    session = FakeSession(CPU, next_token=thinks_on)
    session.go.clear()
    engine = Engine(session, EngineConfig(eos_token_ids=(EOS,), max_num_seqs=1))
    with closing(engine):
        futures = engine.submit(requests)
        session.go.set()
        lengths = [len(future.result().token_ids) for future in futures]
    assert lengths == [6, 10, 26]
    starts = [i for i, step in enumerate(session.steps) if step == [(0, 20)]]
    assert [b - a for a, b in itertools.pairwise(starts)] == [25, 9]


@pytest.mark.parametrize("limit", [1, -1])
def test_a_limit_holds_the_two_tokens_around_a_thought(limit):
    with pytest.raises(OptionsError, match="at least 2"):
        Thinking(begin_id=BEGIN, end_id=END, max_tokens=limit)


def test_an_open_thought_keeps_the_room_of_its_limit():
    thoughts = Thoughts(Thinking(begin_id=BEGIN, end_id=END, max_tokens=9))
    for token_id in (BEGIN, 20):
        assert not thoughts.take(token_id)
    assert thoughts.num_extra_tokens == 9
    assert not thoughts.take(END)
    assert thoughts.num_extra_tokens == 3


def test_no_thought_is_the_first_one_behind_a_part_of_the_answer():
    thoughts = Thoughts(Thinking(begin_id=BEGIN, end_id=END, max_tokens=9))
    assert thoughts.first_id == BEGIN
    assert thoughts.take(20)
    assert thoughts.first_id is None
