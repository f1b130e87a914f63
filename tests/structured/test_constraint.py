"""Constraints: whatever is left of the budget, what comes out is a text of the language."""

import re
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams, sample
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.structured.constraint import Constraint, MaskMaker, allowed_ids
from beam_gemma.structured.grammar import ANY_CHAR, Concat, Literal, OneOf, Repeat, chars, to_regex
from beam_gemma.structured.json_schema import compile_schema
from tests.doubles.fakes import STATES, FakeSession, fake_signature, logits_of
from tests.doubles.schemas import SCHEMAS, check_valid
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
END = TOKENIZER.eos_token_id
LETTERS = chars((ord("a"), ord("z")))
PAGED = STATES[:2]
KINDS = OneOf(tuple(Literal(f'"{kind}"') for kind in ("in", "the", "thin", "a\u00e9\u4e2d")))
OBJECT = Concat(
    (
        Literal('{"the":"'),
        Repeat(LETTERS, 0, 12),
        Literal('","in":['),
        Repeat(Concat((KINDS, Literal(","))), 0, 3),
        KINDS,
        Literal("]}"),
    )
)
LANGUAGES = {
    "object": OBJECT,
    "choices": KINDS,
    "one text": Literal("the thin hat"),
    "forced amid": Concat((LETTERS, Literal(" the thin hat."), LETTERS)),
    "open end": Repeat(LETTERS, 2, None),
    "any text": Repeat(ANY_CHAR, 1, 9),
    "empty or not": Repeat(Literal("the "), 0, 2),
}
CONSTRAINTS = {name: Constraint(language, TOKENIZER, [END]) for name, language in LANGUAGES.items()}


def make_request(name, max_tokens, *, seed=0, temperature=0.0, num_prompt_tokens=20, **params):
    ids = np.random.default_rng(seed).integers(10, 290, num_prompt_tokens).tolist()
    return Request(
        request_id=f"{name} {seed}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, temperature=temperature, **params),
        sampling_key=f"row {seed}",
        constraint=CONSTRAINTS.get(name),
        logprob=True,
    )


def run(requests, *, num_blocks=512, fails=None, **config):
    signature = fake_signature(states=PAGED, vocab_size=310)  # more than the tokenizer has
    session = FakeSession(signature, num_blocks=num_blocks)
    if fails is not None:
        session.fails = fails
    config = EngineConfig(eos_token_ids=(END,), **config)
    with closing(Engine(session, config)) as engine:
        completions = engine.generate(requests)
    assert session.faults == []
    return completions, session


def assert_whole(name, request, completion):
    """Check that a completion is a text of its language, within its budget."""
    assert completion.error is None
    assert len(completion.token_ids) <= request.params.max_tokens
    text = TOKENIZER.decode(completion.token_ids)
    assert re.fullmatch(to_regex(LANGUAGES[name]), text), text


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([*LANGUAGES, "free"]),
            st.integers(0, 40),
            st.sampled_from([0.0, 0.0, 1.0, 30.0]),
            st.sampled_from([0, 0, 4, 200]),
            st.integers(1, 60),
        ),
        min_size=1,
        max_size=8,
    ),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 100),
    num_blocks=st.integers(20, 60),
    fails_at=st.sets(st.integers(2, 30), max_size=2),
)
def test_rows_end_as_texts_of_their_language_and_depend_on_themselves_alone(
    rows, max_num_seqs, budget, num_blocks, fails_at
):
    requests = [
        make_request(
            name,
            (CONSTRAINTS[name].num_shortest if name != "free" else 1) + extra or 1,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            num_prompt_tokens=length,
        )
        for seed, (name, extra, temperature, top_k, length) in enumerate(rows)
    ]
    together, _ = run(
        requests,
        num_blocks=num_blocks,
        fails=lambda step, _: step in fails_at,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    for (name, *_), request, completion in zip(rows, requests, together, strict=True):
        assert run([request])[0] == [completion]
        if name != "free":
            assert_whole(name, request, completion)


@pytest.mark.parametrize("name", ["object", "one text", "open end"])
def test_a_budget_below_the_shortest_text_is_that_rows_error(name):
    shortest = CONSTRAINTS[name].num_shortest
    (short, free), session = run([make_request(name, shortest - 1), make_request("free", 3)])
    assert f"expected at least {shortest}" in short.error
    assert free.error is None
    assert all(len(step) == 1 for step in session.steps), "work for a row that cannot end"


def test_forced_tokens_take_no_step():
    (completion,), session = run([make_request("one text", 50)])
    assert TOKENIZER.decode(completion.token_ids) == "the thin hat"
    assert len(completion.token_ids) > 5
    assert session.steps == [[(0, 20 + len(completion.token_ids))]]


def test_tokens_forced_behind_a_chosen_one_run_with_it():
    (completion,), session = run([make_request("forced amid", 50)])
    num_forced = len(completion.token_ids) - 2
    assert num_forced > 5
    assert session.steps == [[(0, 20)], [(20, 1 + num_forced)]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_choice_is_the_likeliest_token_by_token(temperature):
    """Or drawn, among the tokens that some choice goes on with, whatever the others' logits are."""
    request = make_request("choices", 9, temperature=temperature, seed=3)
    (completion,), _ = run([request])
    choices = [f'"{kind}"'.encode() for kind in ("in", "the", "thin", "a\u00e9\u4e2d")]
    ids = list(request.prompt_token_ids)
    text = b""
    while text not in choices:
        allowed = [
            token_id
            for token_id, data in enumerate(TOKENIZER.vocabulary())
            if data and any(choice.startswith(text + data) for choice in choices)
        ]
        logits = logits_of(
            [np.array(ids, np.float64), np.array(ids[-40:], np.float64)], 0, 310, None
        )
        token_id = sample(
            request.params, logits[allowed], np.array(allowed), key="row 3", position=len(ids)
        )
        ids.append(token_id)
        text += TOKENIZER.token_bytes(token_id)
    assert TOKENIZER.decode(completion.token_ids).encode() == text


def test_masks_tell_of_the_tokenizers_tokens_alone():
    few, any_text = (CONSTRAINTS[name].start() for name in ("choices", "any text"))
    few.take_forced(9)
    mask_of = MaskMaker().begin([few])
    ids = {guide: allowed_ids(mask_of(guide)).tolist() for guide in (few, any_text)}
    assert set(map(TOKENIZER.token_bytes, ids[few])) == {b"i", b"in", b"t", b"th", b"a"}
    assert {TOKENIZER.token_bytes(i) for i in ids[any_text]} >= {b"\n", b"  ", b"a", b"\xc3"}
    for guide, allowed in ids.items():
        assert allowed == [i for i in range(400) if guide.fits(i, 20) and i != END]


def test_a_token_that_may_not_follow_is_an_error_of_one_line():
    guide = CONSTRAINTS["choices"].start()
    with pytest.raises(RecordError) as caught:
        guide.take(TOKENIZER.encode([Text("z")], add_bos=False)[-1])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_constraint_alone_says_where_a_completion_ends():
    with pytest.raises(OptionsError, match="ignore_eos"):
        make_request("choices", 9, ignore_eos=True)


@settings(max_examples=30, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 99), extra=st.integers(0, 40))
def test_any_way_through_any_schema_ends_as_valid_json(schema, seed, extra):
    """Whatever a model prefers: here a token at random of those that the mask allows."""
    constraint = Constraint(compile_schema(schema).language, TOKENIZER, [END])
    rng = np.random.default_rng(seed)
    max_tokens = constraint.num_shortest + extra
    guide = constraint.start()
    mask_of = MaskMaker().begin([])
    ids = guide.take_forced(max_tokens)
    while not guide.is_final:
        num_left = max_tokens - len(ids)
        token_id = int(rng.choice(allowed_ids(mask_of(guide))))
        if not guide.fits(token_id, num_left - 1):
            token_id = guide.next_of_shortest()
        if token_id == END:
            break
        guide.take(token_id)
        ids.append(token_id)
        ids += guide.take_forced(max_tokens - len(ids), limit=15)
    assert len(ids) <= max_tokens
    check_valid(schema, TOKENIZER.decode(ids))
