"""Spans that are attended both ways, in a graph whose results can be said by hand."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from export.graph.to_onnx import trace
from tests.doubles.toys import SPAN, VOCAB, SpanToy

MAX_NUM_SEQS = 4


def exported(build: type, signature: Signature, folder: Path) -> str:
    path = folder / "toy.onnx"
    ir.save(trace(build, signature), path)
    return str(path)


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
    assert Signature.from_json(SPAN.to_json()) == SPAN
