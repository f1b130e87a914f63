"""Engines whose session for CUDA takes sources, on plain memory, beside transformers."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from beam_gemma.engine.embedding_engine import feeds
from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request, Step
from beam_gemma.errors import DeviceError
from beam_gemma.model.graph_tensors import Head
from beam_gemma.runtime.cuda_session import CudaSession
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_shapes import StepSizes
from tests.doubles.cuda_sources import exported_pair, rounded_model
from tests.doubles.encoder_decoder_models import VOCAB, encoder_decoder_outputs
from tests.doubles.late_memory import LateMemory

PRECISIONS = {"t5gemma": "bf16", "t5gemma2": "fp16"}
MODELS = tuple(PRECISIONS)
SLOTS = 4
NEW = 5
TOKENS = 16
"""New tokens of a step, and tokens of sources that may start in one."""
LENGTHS = ((9, 1), (30, 5), (1, 1), (12, 12), (7, 2), (16, 1), (11, 7))
"""Tokens of each row's source and prompt: beyond windows, and beyond the tokens of a step."""


def session(name: str, head: Head, *, has_flash: bool = True) -> CudaSession:
    path, signature = exported_pair(name, "cuda", PRECISIONS[name]).graph(head)
    sizes = StepSizes(
        decode=(SLOTS,),
        prefill=(TOKENS,),
        sources=(TOKENS, 2 * TOKENS),
        has_flash=has_flash,
    )
    if head == "encode":
        sizes = StepSizes(decode=(), prefill=(TOKENS, 2 * TOKENS))
    return CudaSession(
        path, signature, LateMemory(), sizes=sizes, max_num_seqs=SLOTS, memory_utilization=0.9
    )


@contextmanager
def engine(decoder: CudaSession, encoder: CudaSession) -> Iterator[Engine]:
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=TOKENS)
    with closing(Engine(decoder, config, encoder=encoder)) as running:
        yield running


def requests(name: str) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            request_id=str(i),
            source_token_ids=tuple(rng.integers(3, VOCAB[name] - 20, num_source).tolist()),
            prompt_token_ids=(2, *rng.integers(3, VOCAB[name] - 20, num_prompt - 1).tolist()),
            params=SamplingParams(max_tokens=NEW, ignore_eos=True),
            logprob=i % 2 == 0,
        )
        for i, (num_source, num_prompt) in enumerate(LENGTHS)
    ]


@functools.cache
def reference(name: str) -> torch.nn.Module:
    return rounded_model(name)


def assert_completed(completions: Sequence[Completion], name: str) -> None:
    """Compare completions with the reference's most likely tokens."""
    for request, completion in zip(requests(name), completions, strict=True):
        assert completion.error is None
        assert len(completion.token_ids) == NEW
        ids = [*request.prompt_token_ids, *completion.token_ids]
        _, logits = encoder_decoder_outputs(reference(name), [*request.source_token_ids], ids)
        logits = logits[len(request.prompt_token_ids) - 1 : -1]
        taken = np.array(completion.token_ids)[:, None]
        # float32 on both sides.
        chosen = np.take_along_axis(logits, taken, 1)[:, 0]
        np.testing.assert_allclose(chosen, logits.max(axis=1), rtol=0, atol=2e-5)
        if completion.logprob is not None:
            exact = np.take_along_axis(log_softmax(logits, axis=1), taken, 1).sum()
            assert completion.logprob == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "has_flash"), [("t5gemma", True), ("t5gemma2", True), ("t5gemma2", False)]
)
def test_an_engine_completes_as_the_reference_does(name: str, has_flash: bool) -> None:
    decoder = session(name, "generate", has_flash=has_flash)
    encoder = session(name, "encode")
    with engine(decoder, encoder) as running:
        assert_completed(running.generate(requests(name)), name)
        assert_completed(running.generate(requests(name)), name)
        num_sources = (running.stats.num_sources, running.stats.num_reused_sources)
        assert num_sources == (len(LENGTHS), len(LENGTHS))
    stats = decoder.stats()
    assert stats.graphs == 1
    assert 0 < stats.replays < stats.steps


@pytest.mark.parametrize("name", MODELS)
def test_a_preempted_row_reads_its_source_again(name: str) -> None:
    decoder = session(name, "generate")
    decoder.max_steps_in_flight = 1  # what is in flight is never preempted
    with engine(decoder, session(name, "encode")) as running:
        scheduler = running._scheduler
        scheduled, num_steps = scheduler.schedule, itertools.count(1)

        def schedule(*, ahead: bool = False) -> Step:
            """Preempt the newest row at every third step."""
            if next(num_steps) % 3 == 0 and len(scheduler._running) > 1:
                scheduler.preempt(scheduler._running[-1])
            return scheduled(ahead=ahead)

        scheduler.schedule = schedule
        assert_completed(running.generate(requests(name)), name)
        assert running.stats.num_preemptions > 2


@pytest.mark.parametrize("name", MODELS)
def test_states_of_a_source_are_the_reference_s(name: str) -> None:
    """Side by side with others, and alone beyond the tokens of a step."""
    encoder = session(name, "encode")
    for lengths in ((6, 9, 1), (16,), (30,)):
        ids = np.random.default_rng(1).integers(3, VOCAB[name] - 20, sum(lengths)).tolist()
        texts = [ids[end - n : end] for end, n in zip(np.cumsum(lengths), lengths, strict=True)]
        inputs = feeds(texts)
        if "inputs_embeds" in encoder.signature.optional_inputs:
            inputs["inputs_embeds"] = np.zeros((1, encoder.signature.hidden_size), np.float32)
            inputs["embeds_rows"] = np.full(len(ids), -1)
        wanted = [encoder_decoder_outputs(reference(name), text, [2])[0] for text in texts]
        # float32 on both sides; states are of order 1.
        np.testing.assert_allclose(
            encoder.encode(inputs), np.concatenate(wanted), rtol=0, atol=2e-5
        )


def test_sources_without_room_are_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are halved, and a row whose source is longer ends with an error."""
    decoder = session("t5gemma", "generate")
    run = decoder._graph.run

    def fails(binding: object, graph_id: int) -> None:
        shape = decoder._latest and decoder._latest.layout.shape
        if shape and shape.num_source_tokens > TOKENS:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 42")
        run(binding, graph_id)

    monkeypatch.setattr(decoder._graph, "run", fails)
    with engine(decoder, session("t5gemma", "encode")) as running:
        completions = running.generate(requests("t5gemma"))
    assert "no room for sources of 32 tokens; from now on they have at most 16" in caplog.text
    [error] = [c.error for c in completions if c.error]
    assert "expected at most 16 tokens, got 30" in error
    assert decoder._sizes.sources == (TOKENS,)
    with pytest.raises(DeviceError, match="expected at most 16 tokens, got 17"):
        decoder._sizes.source_sizes(17)
