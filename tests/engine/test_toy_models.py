"""The signature is a contract for the whole family: graphs with other kinds of state run on the
same session and engine."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from export.graph.to_onnx import trace
from tests.doubles.toys import DECAY, RECURRENT, SPAN, VOCAB, RecurrentToy, SpanToy

MAX_NUM_SEQS = 4
prompts = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).map(tuple), min_size=1, max_size=9
)


def exported(build: type, signature: Signature, folder: Path) -> str:
    path = folder / "toy.onnx"
    ir.save(trace(build, signature), path)
    return str(path)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(RecurrentToy, RECURRENT, tmp_path_factory.mktemp("recurrent"))


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(SpanToy, SPAN, tmp_path_factory.mktemp("span"))


def complete(path: str, signature: Signature, requests: list[Request], budget: int) -> list[tuple]:
    capacity = Capacity(
        num_blocks={s.group: 40 for s in signature.paged_states}, num_state_slots=MAX_NUM_SEQS
    )
    session = Session(path, signature, capacity, num_threads=1)
    engine = Engine(session, EngineConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=budget))
    try:
        completions = engine.generate(requests)
    finally:
        engine.close()
    assert [c.error for c in completions] == [None] * len(requests)
    return [c.token_ids for c in completions]


@settings(deadline=None, max_examples=20)
@given(prompts=prompts, budget=st.sampled_from([4, 7, 64]))
def test_recurrent_state_follows_its_sequence(
    recurrent: str, prompts: list[tuple[int, ...]], budget: int
) -> None:
    """Across chunks, decode steps, and slots that others used before."""

    def expected(prompt: tuple[int, ...]) -> tuple[int, ...]:
        hidden = np.zeros(VOCAB, np.float32)
        ids = list(prompt)
        for i in range(len(prompt) + 4):
            if i == len(ids):
                # As the graph ranks equal scores: the lower id first.
                ids.append(int(np.argmax(hidden)))
            hidden = np.float32(DECAY) * hidden
            hidden[ids[i]] += 1
        return tuple([*ids, int(np.argmax(hidden))][len(prompt) :])

    params = SamplingParams(max_tokens=5)
    requests = [
        Request(request_id=str(i), prompt_token_ids=p, params=params) for i, p in enumerate(prompts)
    ]
    assert complete(recurrent, RECURRENT, requests, budget) == [expected(p) for p in prompts]


def test_a_token_sees_to_the_end_of_its_span_and_no_further(span: str) -> None:
    """The first token of a span already knows the last; causal tokens do not."""
    session = Session(
        span, SPAN, Capacity(num_blocks={"full_attention": 9}, num_state_slots=0), num_threads=1
    )
    ids = [3, 5, 5, 7, 9]
    feeds = {
        "input_ids": np.array(ids),
        "cu_seqlens": np.array([0, 5], np.int32),
        "past_seqlens": np.array([0], np.int32),
        "logit_rows": np.arange(5),
        "probability_rows": np.arange(0),
        "block_table.full_attention": np.arange(1, 9, dtype=np.int32)[None],
        "slot_mapping.full_attention": np.arange(16, 21, dtype=np.int32),
        "span_ends": np.array([0, 3, 3, 3, 4], np.int32),
    }
    logits = session.run(feeds, with_logits=True).logits
    assert logits is not None
    reach = [ids[:1], ids[:4], ids[:4], ids[:4], ids]
    expected = [np.bincount(tokens, minlength=VOCAB) / len(tokens) for tokens in reach]
    # float32.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [8, 64])
def test_the_engine_keeps_spans_whole(span: str, budget: int) -> None:
    """Chunks of 8 tokens would cut the span; its tokens must still see one another.

    The last prompt token is in the span's reach of 10 tokens, so the share of a token depends on
    all of them having been written before any was read.
    """
    prompt = (1, 2, 2, 4, 4, 4, 4, 6)
    spans = ((2, 8),)
    request = Request(
        request_id="a", prompt_token_ids=prompt, params=SamplingParams(max_tokens=1), spans=spans
    )
    others = [
        Request(request_id=str(i), prompt_token_ids=(i,) * 3, params=SamplingParams(max_tokens=3))
        for i in range(6)
    ]
    got = complete(span, SPAN, [*others, request], budget)
    assert got == [*[(i,) * 3 for i in range(6)], (4,)]


def test_signature_survives_the_manifest() -> None:
    for signature in (RECURRENT, SPAN):
        assert Signature.from_json(signature.to_json()) == signature
