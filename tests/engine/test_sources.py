"""Tiny encoder-decoders in the engine: transformers' tokens, and the same bits in any company.

Sources of 1 to 150 tokens and completions of up to 40 reach far beyond the windows of 6, which go
round in a T5Gemma 2.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Picture, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.model.graph_tensors import Head
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig, Limits
from beam_gemma.runtime.vision_session import VisionSession
from beam_gemma.tasks.open_model import start_engine
from tests.doubles.encoder_decoder_models import WINDOWS, encoder_decoder_outputs, tiny_pair
from tests.doubles.vision_models import BEGIN_ID, END_ID, NUM_IMAGE_TOKENS, SOFT_ID

NAMES = ("t5gemma", "t5gemma2")
NUM_ROWS = 64
BRIEF, WORDY = 9, 40
"""Tokens of most completions, and of each eighth; both longer than the decoder's window."""
FIRST_TEXT_ID, LAST_TEXT_ID = 10, 290
BOS = 2
NAN_TOKEN = 291
BUDGET = 192
"""Tokens of a step; many sources together have more."""
NUM_BLOCKS = 400
SMALL_CACHE = {
    "t5gemma": {"full_attention": 8, "sliding_attention": 30, "cross_attention": 200},
    "t5gemma2": {"full_attention": 20, "sliding_attention": 200},
}
"""Blocks of each group; of the first, little more than the longest row needs."""


@functools.cache
def draw_requests(*, sampled: bool = False) -> list[Request]:
    """Return uneven rows; a quarter has one of three sources, each eighth a long completion."""
    rng = random.Random(7)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(
            rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(rng.randint(low, high))
        )

    shared = [text(20, 90) for _ in range(3)]
    draws = [{"top_k": 20}, {"top_p": 0.8}, {}]
    return [
        Request(
            request_id=f"row {i}",
            prompt_token_ids=(BOS, *text(0, 9 if i % 2 else 0)),
            source_token_ids=shared[i // 4 % 3] if i % 4 == 0 else text(1, 150 if i % 3 else 20),
            params=SamplingParams(
                max_tokens=WORDY if i % 8 == 2 else BRIEF,
                ignore_eos=True,
                **({"temperature": 0.9, "seed": 3} | draws[i % 3] if sampled else {}),
            ),
            sampling_key=str(i),
            logprob=True,
        )
        for i in range(NUM_ROWS)
    ]


def session_of(
    name: str,
    head: Head,
    *,
    num_blocks: int | Mapping[str, int] = NUM_BLOCKS,
    num_threads: int = 1,
) -> Session:
    artifact = tiny_pair(name).artifact
    signature = artifact.signature(head, "cpu")
    if isinstance(num_blocks, int):
        num_blocks = {state.group: num_blocks for state in signature.paged_states}
    capacity = Capacity(num_blocks=num_blocks, num_state_slots=0)
    path = str(artifact.graph_path(head, "cpu"))
    return Session(path, signature, capacity, num_threads=num_threads)


def run(
    name: str,
    batches: list[list[Request]],
    *,
    head: Head = "generate",
    num_blocks: int | Mapping[str, int] = NUM_BLOCKS,
    num_threads: int = 1,
    spoil: Callable[[Session], None] = lambda _: None,
    **limits: int,
) -> tuple[list[Completion], EngineStats]:
    """Complete batches of rows one after another."""
    session = session_of(name, head, num_blocks=num_blocks, num_threads=num_threads)
    encoder = session_of(name, "encode", num_threads=num_threads)
    spoil(encoder)
    artifact = tiny_pair(name).artifact
    vision = None
    if artifact.vision is not None:
        vision = VisionSession.of(artifact, "cpu", num_threads=num_threads)
    config = EngineConfig(**{"max_num_batched_tokens": BUDGET} | limits)
    with closing(Engine(session, config, vision=vision, encoder=encoder)) as engine:
        completions = [c for batch in batches for c in engine.generate(batch)]
        return completions, engine.stats


@functools.cache
def base_of(name: str, *, sampled: bool = False) -> tuple[list[Completion], EngineStats]:
    return run(name, [draw_requests(sampled=sampled)])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_likeliest_of_transformers(name: str) -> None:
    """Of one pass over each row without a cache; by induction these are the greedy tokens."""
    reference = tiny_pair(name).reference
    completions, stats = base_of(name)
    for request, completion in zip(draw_requests(), completions, strict=True):
        ids = [*request.prompt_token_ids, *completion.token_ids]
        _, logits = encoder_decoder_outputs(reference, list(request.source_token_ids), ids)
        likeliest = logits.argmax(axis=1)[len(request.prompt_token_ids) - 1 : -1]
        assert completion.token_ids == tuple(likeliest.tolist())
        best = torch.log_softmax(torch.tensor(logits).double(), -1).max(-1).values
        total = best[len(request.prompt_token_ids) - 1 : -1].sum().item()
        assert completion.logprob == pytest.approx(total, abs=1e-4), "float32, up to 40 tokens"
    assert len({c.token_ids for c in completions}) > NUM_ROWS / 2, "rows differ"
    assert max(len(r.source_token_ids) for r in draw_requests()) > 20 * WINDOWS["encoder"]
    num_sources = len({r.source_token_ids for r in draw_requests()})
    assert num_sources < NUM_ROWS - 10
    assert stats.num_sources == num_sources, "a source that rows share is read once"
    assert stats.num_reused_sources == NUM_ROWS - num_sources


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_generate(name: str) -> None:
    reference = tiny_pair(name).reference
    settings = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=BOS
    )
    for request, completion in zip(draw_requests()[:4], base_of(name)[0], strict=False):
        source, prompt = (
            torch.tensor([ids]) for ids in (request.source_token_ids, request.prompt_token_ids)
        )
        with torch.no_grad():
            output = reference.generate(
                input_ids=source,
                attention_mask=torch.ones_like(source),
                decoder_input_ids=prompt,
                generation_config=settings,
                max_new_tokens=request.params.max_tokens,
            )
        assert completion.token_ids == tuple(output[0, prompt.shape[1] :].tolist())


CONDITIONS: Mapping[str, tuple[dict[str, int], bool]] = {
    "chunks of the prompt": ({"max_num_seqs": 3, "max_num_batched_tokens": 4}, False),
    "small steps, two threads": (
        {"max_num_seqs": 8, "max_num_batched_tokens": 40, "num_threads": 2},
        False,
    ),
    "sampled, two at once": ({"max_num_seqs": 2}, True),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_the_same_in_any_company(name: str, condition: str) -> None:
    how, sampled = CONDITIONS[condition]
    completions, stats = run(name, [draw_requests(sampled=sampled)], **how)
    assert completions == base_of(name, sampled=sampled)[0]
    assert stats.num_preemptions == 0
    if condition == "chunks of the prompt":
        assert stats.num_prefill_steps > NUM_ROWS


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_after_a_preemption(name: str) -> None:
    rows = draw_requests()[:40]
    completions, stats = run(name, [rows], num_blocks=SMALL_CACHE[name], max_num_seqs=16)
    assert completions == base_of(name)[0][:40]
    assert stats.num_preemptions > 0
    num_sources = len({row.source_token_ids for row in rows})
    assert stats.num_sources + stats.num_reused_sources == len(rows) + stats.num_preemptions
    assert stats.num_sources >= num_sources


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_alone_and_in_any_order(name: str) -> None:
    rows = draw_requests()
    order = list(range(NUM_ROWS))
    random.Random(2).shuffle(order)
    for batches in ([[rows[i]] for i in order[:24]], [[rows[i] for i in order]]):
        completions, _ = run(name, batches)
        assert completions == [base_of(name)[0][i] for i in order[: len(completions)]]


@functools.cache
def draw_questions() -> list[Request]:
    """Return rows to score, of 1 to 5 targets; several rows share a source."""
    rng = random.Random(3)
    questions = []
    for i, row in enumerate(draw_requests()[:24]):
        prompt = (BOS, *(rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(i % 12)))
        last = len(prompt) - 1
        places = sorted([last, *(rng.randint(0, last) for _ in range(i % 5))])
        targets = tuple((place, rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID)) for place in places)
        source = draw_requests()[i // 3].source_token_ids
        questions.append(
            replace(
                row,
                prompt_token_ids=prompt,
                source_token_ids=source,
                params=SamplingParams(max_tokens=1),
                targets=targets,
            )
        )
    return questions


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_transformers(name: str) -> None:
    reference = tiny_pair(name).reference
    questions = draw_questions()
    together, stats = run(name, [questions], head="score")
    assert stats.num_sources == len({q.source_token_ids for q in questions}) == 8
    for question, completion in zip(questions, together, strict=True):
        source, prompt = list(question.source_token_ids), list(question.prompt_token_ids)
        _, logits = encoder_decoder_outputs(reference, source, prompt)
        exact = torch.log_softmax(torch.tensor(logits).double(), -1)
        expected = [exact[place, token].item() for place, token in question.targets]
        assert completion.scores == pytest.approx(expected, abs=2e-5), "float32"


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_in_any_company(name: str) -> None:
    questions = draw_questions()
    together, _ = run(name, [questions], head="score")
    assert run(name, [[q] for q in questions], head="score")[0] == together
    shuffled = questions[::-1]
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 5}
    assert run(name, [shuffled], head="score", **limits)[0] == together[::-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_is_not_finite_ends_its_rows_alone(name: str) -> None:
    """Later rows get its blocks, where attention reads beyond their own cells."""
    rows = draw_requests()[:40]
    bad = {1, 6, 7, 15, 22}
    spoiled = [
        replace(r, source_token_ids=(*r.source_token_ids, NAN_TOKEN)) if i in bad else r
        for i, r in enumerate(rows)
    ]

    def spoil(encoder: Session) -> None:
        encode = encoder.encode

        def with_nan(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
            states = encode(feeds).copy()
            for begin, end in itertools.pairwise(feeds["cu_seqlens"].tolist()):
                if NAN_TOKEN in feeds["input_ids"][begin:end]:
                    states[begin:end] = np.nan
            return states

        encoder.encode = with_nan  # type: ignore[method-assign]

    completions, _ = run(name, [spoiled], num_blocks=40, max_num_seqs=6, spoil=spoil)
    for i, (completion, right) in enumerate(zip(completions, base_of(name)[0], strict=False)):
        if i in bad:
            assert completion.error is not None
            assert "expected finite logits, got NaN" in completion.error
        else:
            assert completion == right


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_of_a_model_folder_reads_sources(name: str) -> None:
    rows = draw_requests()[:5]
    artifact = tiny_pair(name).artifact
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=BUDGET)
    with closing(start_engine(artifact, "generate", "cpu", limits)) as engine:
        assert engine.generate(rows) == base_of(name)[0][:5]


def picture_row(numbers: list[int], seed: int) -> Request:
    """Return a row whose source has pictures between texts."""
    rng = random.Random(seed)
    ids: list[int] = [BOS]
    pictures = []
    for number in numbers:
        ids += [rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(3)] + [BEGIN_ID]
        pixels = np.random.default_rng(number).integers(0, 256, (3, 56, 56), np.uint8)
        digest = hashlib.blake2b(pixels.tobytes()).digest()
        pictures.append(Picture(len(ids), digest, pixels, NUM_IMAGE_TOKENS))
        ids += [SOFT_ID] * NUM_IMAGE_TOKENS + [END_ID]
    ids += [rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(5)]
    return replace(
        draw_requests()[0],
        prompt_token_ids=(BOS,),
        source_token_ids=tuple(ids),
        media=tuple(pictures),
    )


def test_pictures_of_sources_are_those_of_transformers() -> None:
    """Rows of 0 to 3 pictures, of which there are 4; two rows differ in a picture alone."""
    rows = [picture_row(n, seed) for seed, n in enumerate(([0], [1, 2], [], [3, 0, 1], [2, 2]))]
    rows += [picture_row([1], 0), rows[0]]
    together, stats = run("t5gemma2", [rows], max_num_batched_tokens=100)
    assert stats.num_pictures == 4
    assert (stats.num_sources, stats.num_reused_sources) == (6, 1)
    assert [run("t5gemma2", [[row]])[0][0] for row in rows] == together
    reference = tiny_pair("t5gemma2").reference
    for row, completion in zip(rows, together, strict=True):
        source = torch.tensor([row.source_token_ids])
        ids = [*row.prompt_token_ids, *completion.token_ids]
        inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        if row.media:
            pixels = torch.tensor(np.stack([p.values for p in row.media]))
            inputs["pixel_values"] = (pixels.float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            outputs = reference(**inputs, decoder_input_ids=torch.tensor([ids]), use_cache=False)
        assert completion.token_ids == tuple(outputs.logits[0].argmax(-1)[:-1].tolist())
        best = torch.log_softmax(outputs.logits[0, :-1].double(), -1).max(-1).values
        assert completion.logprob == pytest.approx(best.sum().item(), abs=2e-5), "float32"
    assert len({c.logprob for c in together}) == 6, "each source makes a difference"
