"""Pictures of an EmbeddingGemma 2, from the reference to our module, its graphs and its steps.

Pictures take fewer and more tokens than a layer with a window sees on each side.
"""

import contextlib
import functools
from dataclasses import replace
from typing import NoReturn

import numpy as np
import onnxruntime
import pytest
import torch

from beam_gemma.engine.embedding_engine import EmbeddingSteps, Result, check_sight, feeds
from beam_gemma.engine.media_store import MediaStore, check_encoder
from beam_gemma.engine.packing import place_embeddings
from beam_gemma.engine.sequence import Picture
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.step_shapes import StepSizes, host_dtype, pad, side_by_side
from beam_gemma.runtime.vision_session import VisionSession
from export.checkpoints.hf_folder import read_checkpoint
from export.graph.weights import inverse_frequencies
from tests.doubles.checkpoint_files import values
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Model, checked
from tests.doubles.embedding_gemma2_models import (
    RADIUS,
    embedding_of,
    encoder_module,
    seeing_model,
    seen_states,
    tiny_embedder,
)
from tests.doubles.embedding_pictures import SeenText, seen_text
from tests.doubles.gemma4_seeing import picture_features
from tests.doubles.reference import float64_throughout

NAME = "embedding_gemma2"
LARGE, SMALL, ONE = (5, 6), (2, 3), (1, 1)
ROWS = [
    seen_text(sizes, num_words, seed=seed)
    for seed, (sizes, num_words) in enumerate([
        ([LARGE], 0), ([SMALL], 30), ([LARGE, SMALL], 5), ([ONE], RADIUS), ([], 20), ([], 1),
        ([LARGE, LARGE], 3),
    ])
]  # fmt: skip
Features = dict[bytes, np.ndarray]


def inputs_of(
    rows: list[SeenText], signature: Signature, features: Features
) -> dict[str, np.ndarray]:
    """Return the packed inputs of a step over texts with pictures."""
    packed = feeds([row.token_ids for row in rows])
    starts = packed["cu_seqlens"].tolist()
    ranges = [
        (start, 0, len(row.token_ids), row.pictures)
        for start, row in zip(starts, rows, strict=False)
    ]
    return packed | place_embeddings(ranges, starts[-1], signature, features)


@functools.cache
def reference_states(dtype: torch.dtype) -> list[np.ndarray]:
    """Return the reference's projected states [T, W] of each row."""
    model = seeing_model(NAME).to(dtype)
    try:
        return [seen_states(model, row.token_ids, row.pixels) for row in ROWS]
    finally:
        model.float()


def reference_features(dtype: torch.dtype) -> Features:
    """Return the reference's embeddings of all pictures, by their digests."""
    model = seeing_model(NAME).to(dtype)
    pictures = [picture for row in ROWS for picture in row.pictures]
    is_double = dtype == torch.float64
    try:
        with float64_throughout() if is_double else contextlib.nullcontext():
            return {
                p.digest: picture_features(model, torch.from_numpy(p.values)).numpy()
                for p in pictures
            }
    finally:
        model.float()


@functools.cache
def session(num_threads: int) -> Session:
    artifact = tiny_embedder(NAME).seeing
    path = str(artifact.graph_path("embed", "cpu"))
    nothing = Capacity(num_blocks={}, num_state_slots=0)
    return Session(path, artifact.signature("embed", "cpu"), nothing, num_threads=num_threads)


def steps(
    num_threads: int = 2, budget: int = 4096, max_bytes: int = 1 << 20
) -> tuple[EmbeddingSteps, MediaStore]:
    """Return steps over our graphs, and their embeddings of pictures."""
    tower = VisionSession.of(tiny_embedder(NAME).seeing, "cpu", num_threads=num_threads)
    check_encoder(tower.signature, session(num_threads).signature)
    store = MediaStore({Picture: tower}, max_bytes=max_bytes)
    made = EmbeddingSteps(
        session(num_threads),
        max_num_batched_tokens=budget,
        on_step=lambda _: None,
        media=store,
    )
    return made, store


def embedded(made: EmbeddingSteps, rows: list[SeenText]) -> list[Result]:
    """Return the results of rows in their order."""
    pictures = {number: row.pictures for number, row in enumerate(rows) if row.pictures}
    found = dict(made([row.token_ids for row in rows], pictures))
    return [found[number] for number in range(len(rows))]


@functools.cache
def together() -> np.ndarray:
    """Return our embeddings of all rows [B, W], computed in one step."""
    return np.array(embedded(steps()[0], ROWS))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.no_grad()
def test_module_in_float64_equals_the_reference(device: Device) -> None:
    """States of all tokens, which see pictures beside them, and embeddings; packed or padded."""
    module = encoder_module(tiny_embedder(NAME), device, torch.float64, sees=True)
    signature = replace(module.signature, dtype="float64")
    packed = inputs_of(ROWS, signature, reference_features(torch.float64))
    arrays = packed if device == "cpu" else side_by_side(packed)
    step = {key: torch.from_numpy(array) for key, array in arrays.items()}
    states = module.norm(module.states(step)[0])
    outputs, _ = module(step, {})
    ends = np.cumsum([len(row.token_ids) for row in ROWS])[:-1]
    projected = np.split(module.dense[0](states).numpy(), ends)
    exact = reference_states(torch.float64)
    for ours, theirs, embedding in zip(projected, exact, outputs["embedding"], strict=True):
        # float64.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        np.testing.assert_allclose(embedding, embedding_of(theirs), rtol=0, atol=1e-9)


def test_graphs_are_as_exact_as_the_reference() -> None:
    """The tower's graph and then the encoder's, in float32."""
    exact = np.stack([embedding_of(s) for s in reference_states(torch.float64)])
    theirs = np.stack([embedding_of(s) for s in reference_states(torch.float32)])
    our_error, their_error = np.abs(together() - exact).max(), np.abs(theirs - exact).max()
    assert our_error <= 2 * their_error, f"{our_error:.2e} against {their_error:.2e}, float32"
    distances = np.abs(together()[:, None] - together()[None]).max(-1)
    assert distances[~np.eye(len(ROWS), dtype=bool)].min() > 1e3 * our_error, "rows differ"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_do_not_depend_on_company_or_threads(num_threads: int) -> None:
    for budget in (1, 60, 4096):
        made, _ = steps(num_threads, budget)
        for order in (ROWS[::-1], ROWS[2:5], ROWS[:1] * 20 + ROWS[4:]):
            expected = [together()[ROWS.index(row)] for row in order]
            np.testing.assert_array_equal(np.array(embedded(made, order)), expected)
    for row, expected in zip(ROWS, together(), strict=True):
        np.testing.assert_array_equal(embedded(steps(num_threads)[0], [row])[0], expected)


def test_texts_are_the_same_bits_with_and_without_a_tower() -> None:
    artifact = tiny_embedder(NAME).artifact
    path = str(artifact.graph_path("embed", "cpu"))
    nothing = Capacity(num_blocks={}, num_state_slots=0)
    plain = Session(path, artifact.signature("embed", "cpu"), nothing, num_threads=2)
    texts = [row for row in ROWS if not row.pictures]
    alone = plain.embed(feeds([row.token_ids for row in texts])).embedding
    np.testing.assert_array_equal(np.array(embedded(steps()[0], texts)), alone)


def test_pictures_are_computed_once_while_they_are_kept() -> None:
    made, store = steps()
    embedded(made, [ROWS[0], ROWS[2], ROWS[0]])
    assert (store.num_computed[Picture], store.num_reused[Picture]) == (3, 1)
    embedded(made, [ROWS[0]])
    assert made.picture_counts() == {"pictures": 3, "reused_pictures": 2}
    made, store = steps(max_bytes=0)
    for _ in range(2):
        np.testing.assert_array_equal(embedded(made, [ROWS[0]])[0], together()[0])
        embedded(made, [ROWS[1]])
    assert store.num_computed[Picture] == 4


def test_a_tower_that_fails_ends_only_rows_with_its_pictures() -> None:
    def broken() -> NoReturn:
        raise MemoryError("too much")

    tower = VisionSession(tiny_embedder(NAME).seeing.signature("vision", "cpu"), broken)
    made = EmbeddingSteps(
        session(2),
        max_num_batched_tokens=4096,
        on_step=lambda _: None,
        media=MediaStore({Picture: tower}),
    )
    found = embedded(made, [ROWS[0], ROWS[4], ROWS[5]])
    assert found[0] == "model: expected an embedding, got twice MemoryError: too much"
    np.testing.assert_array_equal(np.array(found[1:]), together()[4:6])


def test_the_first_token_sees_the_last_one() -> None:
    check_sight(session(2), [5, 6, 7], is_two_sided=True)


def test_a_graph_for_cuda_gives_the_reference_s_embeddings() -> None:
    """Steps are padded as for a GPU, with pictures and without."""
    checkpoint = read_checkpoint(tiny_embedder(NAME).checkpoint.path)
    weights = {name: values(stored) for name, stored in checkpoint.tensors.items()}
    for group in checkpoint.config.groups:
        weights[f"rotary.{group}.inv_freq"] = inverse_frequencies(checkpoint.config, group)
    model = Model(
        NAME,
        seeing_model(NAME),
        checkpoint.config,
        checkpoint.embedding,
        weights,
        checkpoint.vision,
    )
    graph, signature = model.graph("embed", "float16")
    assert unplaced(checked(graph)) == [], "nodes without a kernel for CUDA"
    run = model.session(graph)
    wide = replace(signature, dtype="float32")
    features = reference_features(torch.float32)
    exact = [embedding_of(states) for states in reference_states(torch.float32)]
    for rows in (list(range(len(ROWS))), [4, 5]):
        found = _padded_run(run, wide, [ROWS[i] for i in rows], features)
        # float32 on both sides; length 1.
        np.testing.assert_allclose(found, [exact[i] for i in rows], rtol=0, atol=2e-6)


def _padded_run(
    run: onnxruntime.InferenceSession,
    signature: Signature,
    rows: list[SeenText],
    features: Features,
) -> np.ndarray:
    """Return the embeddings of a step whose inputs a session for CUDA would pad."""
    step = side_by_side(inputs_of(rows, signature, features))
    shape = StepSizes(decode=(), prefill=(512,)).shape(step, signature, with_logits=False)
    into = {t.name: np.empty(shape.of(t), host_dtype(t.dtype)) for t in signature.step_inputs()}
    pad(step, shape, into, spare_slot=0)
    [found] = run.run(["embedding"], into)
    return found[: len(rows)]
