"""Tiny Gemma 4 models that see, in the engine: transformers' tokens, the same bits in any company.

Pictures take 1 to 16 tokens, more and fewer than the windows have.
"""

import functools
import hashlib
import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Picture, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.runtime.vision_session import VisionSession
from export.__main__ import export
from tests.doubles.gemma4_seeing import (
    BEGIN_ID,
    END_ID,
    IMAGE_ID,
    SEEING,
    STEP,
    padded_pictures,
    save_seeing_gemma4,
    seeing_gemma4,
)
from tests.doubles.once import exporter_digest, kept

SIZES = ((2, 3), (1, 1), (4, 4), (1, 5), (3, 2))
"""Heights and widths of the pictures in tokens."""
NUM_ROWS = 16
FIRST_TEXT_ID, LAST_TEXT_ID = 10, 290


@functools.cache
def model_of(name: str) -> tuple[torch.nn.Module, Artifact]:
    """Return the reference and what we made of it."""
    reference = seeing_gemma4(name).eval()

    def make(folder: Path) -> None:
        checkpoint = save_seeing_gemma4(reference, folder / "checkpoint")
        export(checkpoint, folder / "artifact", tasks=["generate"])

    folder = kept(f"gemma4-pictures-{name}-{exporter_digest()}", make)
    return reference, Artifact.open(folder / "artifact")


def picture_pixels(number: int) -> np.ndarray:
    height, width = (STEP * side for side in SIZES[number])
    return np.random.default_rng(number).integers(0, 256, (3, height, width), np.uint8)


@functools.cache
def draw_requests(name: str) -> tuple[Request, ...]:
    """Return rows of 0 to 3 pictures between texts; a third of them begin with the same example."""
    rng = random.Random(5)

    def text(low: int, high: int) -> list[int]:
        return [rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(rng.randint(low, high))]

    example: list[int | list[int]] = [[2, *text(5, 5)], 2, text(9, 9)]
    rows = []
    for i in range(NUM_ROWS):
        inner = [part for _ in range(i % 4) for part in (text(0, 12), rng.randrange(len(SIZES)))]
        start = example if i % 3 == 0 else [[2]]
        rows.append(make_request(name, [*start, *inner, text(1, 40)]))
    return tuple(rows)


def make_request(name: str, parts: list[int | list[int]]) -> Request:
    """Return a request of texts, as lists of ids, with pictures, as numbers, in between."""
    ids: list[int] = []
    pictures = []
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        pixels, count = picture_pixels(part), SIZES[part][0] * SIZES[part][1]
        ids.append(BEGIN_ID)
        digest = hashlib.blake2b(pixels.tobytes()).digest()
        pictures.append(Picture(len(ids), digest, pixels, count))
        ids += [IMAGE_ID] * count + [END_ID]
    two_sided = SEEING[name][1] is not None
    return Request(
        request_id="row",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=8, ignore_eos=True),
        media=tuple(pictures),
        spans=tuple((p.start, p.end) for p in pictures) if two_sided else (),
    )


def run(
    name: str, batches: list[tuple[Request, ...]], config: EngineConfig, *, num_threads: int = 1
) -> tuple[list[Completion], EngineStats]:
    """Complete batches of rows one after another."""
    artifact = model_of(name)[1]
    signature = artifact.signature("generate", "cpu")
    capacity = Capacity(
        num_blocks={state.group: 500 for state in signature.paged_states}, num_state_slots=0
    )
    path = str(artifact.graph_path("generate", "cpu"))
    session = Session(path, signature, capacity, num_threads=num_threads)
    vision = VisionSession.of(artifact, "cpu", num_threads=num_threads)
    with closing(Engine(session, config, vision=vision)) as engine:
        completions = [c for batch in batches for c in engine.generate(batch)]
        return completions, engine.stats


@functools.cache
def base_of(name: str) -> tuple[list[Completion], EngineStats]:
    return run(name, [draw_requests(name)], EngineConfig())


def reference_tokens(model: torch.nn.Module, request: Request) -> tuple[int, ...]:
    """Return transformers' greedy tokens after a prompt with pictures."""
    ids = torch.tensor([request.prompt_token_ids])
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == IMAGE_ID).long()
    if request.media:
        inputs |= padded_pictures(model, [p.values for p in request.media])
    length = request.params.max_tokens
    with torch.no_grad():
        found = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
    return tuple(found[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", SEEING)
def test_tokens_are_those_of_generate(name: str) -> None:
    reference = model_of(name)[0]
    completions, stats = base_of(name)
    expected = [reference_tokens(reference, row) for row in draw_requests(name)]
    assert [c.token_ids for c in completions] == expected
    assert len(set(expected)) > NUM_ROWS / 2, "rows differ"
    assert stats.num_pictures == len(SIZES), "each picture is computed once"
    assert stats.num_cached_tokens > 0


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize(
    ("limits", "num_threads"),
    [
        ({"enable_prefix_caching": False}, 1),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 40}, 1),
        ({}, 2),
    ],
    ids=["no reuse", "chunks of 40", "two threads"],
)
def test_rows_are_the_same_in_any_company(
    name: str, limits: dict[str, int], num_threads: int
) -> None:
    completions, _ = run(
        name, [draw_requests(name)], EngineConfig(**limits), num_threads=num_threads
    )
    assert completions == base_of(name)[0]


@pytest.mark.parametrize("name", SEEING)
def test_rows_are_the_same_alone(name: str) -> None:
    rows = draw_requests(name)
    completions, _ = run(name, [(row,) for row in rows[::-1]], EngineConfig())
    assert completions == base_of(name)[0][::-1]
