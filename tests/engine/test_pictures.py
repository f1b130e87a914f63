"""Tiny models that see, in the engine: transformers' tokens, and the same bits in any company.

Each row's reference is `generate` on its prompt and pictures alone. Pictures take 16 tokens, which
is more than the windows of 10.
"""

import functools
import random
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.step_interface import Finished, StepOutput
from beam_gemma.runtime.vision_session import VisionSession
from tests.doubles.picture_requests import MODELS, make_request, model_of
from tests.doubles.vision_models import (
    IMAGE_ID,
    MAX_LENGTH,
    NUM_IMAGE_TOKENS,
    SOFT_ID,
    tiny_vision_model,
)

NUM_ROWS = 24
BRIEF, WORDY = 8, 40
"""Tokens of most completions, and of each sixth."""
FIRST_TEXT_ID, LAST_TEXT_ID = 10, 290
PARITY = 2e-5


def draw_requests(name: str) -> list[Request]:
    """Return rows of 0 to 3 pictures out of 5; a third of Gemma 3's start with the same example."""
    rng = random.Random(5)

    def text(low: int, high: int) -> list[int]:
        return [rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(rng.randint(low, high))]

    example = [[2, *text(5, 5)], 0, text(9, 9)]
    rows: list[list[int | list[int]]] = []
    for i in range(NUM_ROWS):
        pictures = [rng.randrange(5) for _ in range(i % 4)]
        if name != "gemma3":
            rows.append([*pictures, [2, *text(1, 60)]])
        else:
            inner = [part for number in pictures for part in (text(0, 12), number)]
            start = example if i % 3 == 0 else [[2]]
            rows.append([*start, *inner, text(1, 60)])
    lengths = [WORDY if i % 6 == 2 else BRIEF for i in range(NUM_ROWS)]
    return [
        make_request(name, row, max_tokens=length)
        for row, length in zip(rows, lengths, strict=True)
    ]


class RecordingSession(Session):
    """A session that keeps the logits of all of its rows."""

    logits: list[np.ndarray]

    def start(self, feeds, *, with_logits: bool = False, with_candidates: bool = True) -> Finished:
        """Run one step with logits."""
        del with_logits
        finished = super().start(feeds, with_logits=True, with_candidates=with_candidates)
        assert isinstance(finished.output, StepOutput)
        assert finished.output.logits is not None
        self.logits.append(np.array(finished.output.logits))
        return finished


def session_of(name: str, num_blocks: int = 500, *, num_threads: int = 1) -> RecordingSession:
    artifact = model_of(name)[1]
    signature = artifact.signature("generate", "cpu")
    blocks = {state.group: num_blocks for state in signature.paged_states}
    capacity = Capacity(num_blocks=blocks, num_state_slots=0)
    path = str(artifact.graph_path("generate", "cpu"))
    session = RecordingSession(path, signature, capacity, num_threads=num_threads)
    session.logits = []
    return session


def run(
    name: str,
    batches: list[list[Request]],
    config: EngineConfig,
    *,
    num_blocks: int = 500,
    num_threads: int = 1,
) -> tuple[list[Completion], EngineStats]:
    """Complete batches of rows one after another."""
    session = session_of(name, num_blocks, num_threads=num_threads)
    vision = VisionSession.of(model_of(name)[1], "cpu", num_threads=num_threads)
    with closing(Engine(session, config, vision=vision)) as engine:
        completions = [c for batch in batches for c in engine.generate(batch)]
        return completions, engine.stats


def reference_logits(
    model: torch.nn.Module, name: str, request: Request
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return transformers' greedy tokens after a prompt, and the logits [N, V] of each."""
    ids = torch.tensor([request.prompt_token_ids])
    dtype = next(model.parameters()).dtype
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request.media:
        pixels = torch.tensor(np.stack([p.values for p in request.media]))
        inputs["pixel_values"] = (pixels.to(dtype) / 255 - 0.5) / 0.5
    is_soft = ids == (SOFT_ID if name == "gemma3" else IMAGE_ID)
    # PaliGemma's processor gives all tokens of a prompt the type 0.
    inputs["token_type_ids"] = is_soft.long() if name == "gemma3" else torch.zeros_like(ids)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=request.params.max_tokens,
            min_new_tokens=request.params.max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = tuple(output.sequences[0, ids.shape[1] :].tolist())
    return tokens, torch.stack(output.logits)[:, 0].double().numpy()


@functools.cache
def base_of(name: str) -> tuple[list[Completion], EngineStats]:
    return run(name, [draw_requests(name)], EngineConfig())


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name: str) -> None:
    reference = model_of(name)[0]
    completions, stats = base_of(name)
    expected = [reference_logits(reference, name, row)[0] for row in draw_requests(name)]
    assert [c.token_ids for c in completions] == expected
    assert len(set(expected)) > NUM_ROWS / 2, "rows differ"
    assert stats.num_pictures == 5, "each picture is computed once"
    assert stats.num_reused_pictures > 20
    assert (stats.num_cached_tokens > 0) == (name == "gemma3")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference(name: str) -> None:
    """Of prefill and of decode; on average at most twice as far from the exact ones."""
    reference = model_of(name)[0]
    exact = tiny_vision_model(name).double().eval()
    errors = []
    for row in draw_requests(name)[:8]:
        session = session_of(name)
        vision = VisionSession.of(model_of(name)[1], "cpu", num_threads=1)
        with closing(Engine(session, EngineConfig(), vision=vision)) as engine:
            [completion] = engine.generate([row])
        ours = np.concatenate(session.logits)
        tokens, theirs = reference_logits(reference, name, row)
        exact_tokens, right = reference_logits(exact, name, row)
        assert completion.token_ids == tokens == exact_tokens
        np.testing.assert_allclose(ours, right, rtol=0, atol=PARITY)
        errors.append([np.square(logits - right).mean() for logits in (ours, theirs)])
    our_error, their_error = np.sqrt(np.mean(errors, axis=0))
    assert our_error <= 2 * their_error


CONDITIONS: Mapping[str, tuple[dict[str, int | bool], dict[str, int]]] = {
    "no reuse": ({"enable_prefix_caching": False}, {}),
    "few at once": ({"max_num_seqs": 2, "max_num_batched_tokens": MAX_LENGTH}, {}),
    "small cache": ({"max_num_batched_tokens": MAX_LENGTH}, {"num_blocks": 20}),
    "two threads": ({}, {"num_threads": 2}),
}
CHUNKS = {
    "chunks of a picture": {"max_num_seqs": 4, "max_num_batched_tokens": NUM_IMAGE_TOKENS},
    "chunks of 40": {"max_num_seqs": 4, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_the_same_in_any_company(name: str, condition: str) -> None:
    limits, how = CONDITIONS[condition]
    completions, stats = run(name, [draw_requests(name)], EngineConfig(**limits), **how)
    assert completions == base_of(name)[0]
    assert (stats.num_preemptions > 0) == (condition == "small cache")
    assert condition != "no reuse" or stats.num_cached_tokens == 0


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_same_alone_and_in_any_order(name: str) -> None:
    rows = draw_requests(name)
    order = list(range(NUM_ROWS))
    random.Random(2).shuffle(order)
    for batches in ([[rows[i]] for i in order], [[rows[i] for i in order]]):
        completions, _ = run(name, batches, EngineConfig())
        assert completions == [base_of(name)[0][i] for i in order]


@pytest.mark.parametrize("condition", CHUNKS)
def test_rows_are_the_same_in_chunks_around_pictures(condition: str) -> None:
    limits = CHUNKS[condition]
    completions, stats = run("gemma3", [draw_requests("gemma3")], EngineConfig(**limits))
    assert completions == base_of("gemma3")[0]
    assert stats.num_prefill_steps > NUM_ROWS


@pytest.mark.parametrize("num_before", [1, 4, 7, 13, 16])
def test_a_prefix_that_ends_inside_a_picture_gives_the_same_bits(num_before: int) -> None:
    """The second row takes blocks of 16 tokens from the first; they end in its second picture."""
    text = list(range(20, 20 + num_before))
    rows = [make_request("gemma3", [text, 0, [50, 51], 1, [number, 52]]) for number in (60, 61)]
    alone, _ = run("gemma3", [[rows[1]]], EngineConfig(enable_prefix_caching=False))
    after, stats = run("gemma3", [[row] for row in rows], EngineConfig())
    assert after[1] == alone[0]
    shared = (num_before + 2 * 18 + 2) // 16 * 16
    assert stats.num_cached_tokens == shared
    start = rows[1].media[1].start
    assert start < shared < start + NUM_IMAGE_TOKENS


def test_equal_prompts_of_a_model_that_sees_them_whole_share_their_blocks() -> None:
    """They differ in the key of their draws; PaliGemma 2's windows are too short to share."""
    for name, num_cached in (("paligemma", 48), ("paligemma2", 0)):
        row = make_request(name, [0, 1, [2, *range(20, 40)]], temperature=1.0, seed=4)
        rows = [replace(row, sampling_key=key) for key in ("a", "b")]
        alone, _ = run(name, [rows], EngineConfig(enable_prefix_caching=False))
        shared, stats = run(name, [rows], EngineConfig())
        assert shared == alone
        assert shared[0].token_ids != shared[1].token_ids
        assert stats.num_cached_tokens == num_cached
