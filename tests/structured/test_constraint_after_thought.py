"""Constraints hold for the answer after a thought, whatever the model does with its thought."""

import hashlib
import re
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.engine.thoughts import Thinking
from beam_gemma.errors import OptionsError
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.structured.constraint import Constraint
from beam_gemma.structured.grammar import to_regex
from beam_gemma.tasks.thoughts import parts_of
from tests.doubles.async_session import AsyncSession
from tests.doubles.fakes import STATES, FakeSession, fake_signature
from tests.doubles.thinking import BEGIN, END, EOS, TOKENIZER, text_ids
from tests.structured.test_constraint import LANGUAGES

CONSTRAINTS = {name: Constraint(language, TOKENIZER, [EOS]) for name, language in LANGUAGES.items()}
CPU, CUDA = (
    fake_signature(device=device, states=STATES[:2], optional_inputs=(), vocab_size=310)
    for device in ("cpu", "cuda")
)
(HM,) = text_ids("\n\n")
"""A token of thoughts that no language has."""


def fickle(tokens):
    """Return a token after others: often the begin or the end of a thought, or of all."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=4).digest()
    common = (BEGIN, BEGIN, BEGIN, END, EOS, EOS, HM, HM, HM, *text_ids('the in{"":]}'))
    return common[int.from_bytes(digest, "little") % len(common)]


def make_request(name, max_tokens, limit, *, seed=0, is_begun=False, temperature=0.0, top_k=0):
    ids = np.random.default_rng(seed).integers(10, 290, 20).tolist()
    return Request(
        request_id=f"{name} {seed}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k),
        sampling_key=f"row {seed}",
        constraint=CONSTRAINTS[name],
        thinking=Thinking(begin_id=BEGIN, end_id=END, max_tokens=limit, is_begun=is_begun),
        logprob=True,
    )


def run(session, requests, **config):
    engine = Engine(session, EngineConfig(eos_token_ids=(EOS,), **config))
    session.cache = engine._cache
    with closing(engine):
        completions = engine.generate(requests)
    assert session.faults == []
    return completions


def answer_of(request, completion):
    """Return the text of an answer, after a check of all limits."""
    assert completion.error is None
    parts = parts_of(completion.token_ids, request.thinking)
    assert len(parts.thoughts) <= 1
    assert len(parts.answer) <= request.params.max_tokens
    assert len(completion.token_ids) - len(parts.answer) <= request.thinking.max_tokens
    return TOKENIZER.decode(parts.answer)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(sorted(LANGUAGES)),
            st.integers(0, 30),
            st.sampled_from([2, 3, 5, 30]),
            st.booleans(),
            st.sampled_from([0.0, 0.0, 1.0, 30.0]),
            st.sampled_from([0, 4, 200]),
        ),
        min_size=1,
        max_size=5,
    ),
    num_blocks=st.integers(14, 60),
    fails_at=st.sets(st.integers(2, 30), max_size=2),
)
def test_answers_are_of_their_language_in_any_company(device, rows, num_blocks, fails_at):
    requests = [
        make_request(
            name,
            CONSTRAINTS[name].num_shortest + extra or 1,
            limit,
            seed=seed,
            is_begun=is_begun,
            temperature=temperature,
            top_k=top_k,
        )
        for seed, (name, extra, limit, is_begun, temperature, top_k) in enumerate(rows)
    ]

    def session(num_blocks):
        if device == "cuda":
            return AsyncSession(CUDA, num_blocks=num_blocks, next_token=fickle)
        return FakeSession(CPU, num_blocks=num_blocks, next_token=fickle)

    crowded = session(num_blocks)
    crowded.fails = lambda step, _: step in fails_at
    together = run(crowded, requests, max_num_seqs=3, max_num_batched_tokens=60)
    for (name, *_), request, completion in zip(rows, requests, together, strict=True):
        assert run(session(200), [request], max_num_seqs=1) == [completion]
        assert re.fullmatch(to_regex(LANGUAGES[name]), answer_of(request, completion))


def scripted(*tokens):
    """Return a session that wants these tokens, the last one again and again."""
    return FakeSession(
        CPU, num_blocks=200, next_token=lambda ids: tokens[min(len(ids) - 20, len(tokens) - 1)]
    )


@pytest.mark.parametrize(
    ("script", "thought"),
    [
        ((BEGIN, HM), [BEGIN, *[HM] * 6, END]),
        ((BEGIN, END, HM), [BEGIN, END]),
        ((HM,), []),
        ((EOS,), []),
        ((END,), []),
        ((BEGIN, HM, EOS), [BEGIN, HM, END]),
        ((BEGIN, BEGIN, HM, END, BEGIN), [BEGIN, BEGIN, HM, END]),
    ],
    ids=[
        "never ends", "ends at once", "left out", "ends the turn at once", "ends without a begin",
        "ends the turn in the thought", "begins twice",
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_the_shortest_answer_has_room_after_any_thought(script, thought, temperature):
    for name in ("object", "one text"):
        request = make_request(name, CONSTRAINTS[name].num_shortest, 8, temperature=temperature)
        [completion] = run(scripted(*script), [request], max_num_seqs=1)
        text = answer_of(request, completion)
        assert list(completion.token_ids[: len(thought)]) == thought
        assert re.fullmatch(to_regex(LANGUAGES[name]), text)
        assert completion.finish_reason == "stop"


def test_an_answer_whose_tokens_are_forced_follows_its_thought_in_one_step():
    request = make_request("one text", 20, 3)
    session = scripted(BEGIN, HM)
    [completion] = run(session, [request], max_num_seqs=1)
    num_answer = len(completion.token_ids) - 3
    assert TOKENIZER.decode(completion.token_ids[3:]) == "the thin hat"
    assert num_answer > 5
    assert session.steps == [[(0, 20)], [(20, 1)]]


def test_a_prompt_within_a_thought_has_it_ended_before_the_answer():
    request = make_request("choices", 9, 4, is_begun=True)
    [completion] = run(scripted(HM), [request], max_num_seqs=1)
    assert list(completion.token_ids[:4]) == [HM, HM, HM, END]
    assert re.fullmatch(to_regex(LANGUAGES["choices"]), answer_of(request, completion))


def test_logprob_leaves_out_thoughts_and_what_is_forced():
    """The tokens of the thought are drawn among many, and all of the answer's are forced."""
    request = make_request("one text", 20, 8, is_begun=True, temperature=1.0)
    [completion] = run(FakeSession(CPU, num_blocks=200), [request], max_num_seqs=1)
    assert answer_of(request, completion) == "the thin hat"
    assert completion.token_ids[7] == END
    assert completion.logprob == 0


@pytest.mark.parametrize("limit", [None, 0])
def test_a_constraint_needs_thoughts_with_a_limit(limit):
    with pytest.raises(OptionsError, match="limit of thoughts"):
        make_request("choices", 9, limit)
