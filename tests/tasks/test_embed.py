"""The embed task on real graphs, against sentence-transformers and against itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from beam_gemma.engine.embedding_engine import EmbeddingSteps
from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import Count
from beam_gemma.monitoring.timeline import Pulse
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.step_interface import EmbedOutput
from beam_gemma.tasks.embed import Embedder, shortened
from beam_gemma.tasks.text_encoder import EmbedSettings, TextEncoder
from tests.doubles.sentence_model import PROMPTS, encode, texts

TOLERANCE = 2e-5
"""Of float32 embeddings of length 1."""
CPU = ("embed", "cpu")


def session_of(artifact: Artifact, num_threads: int = 2) -> Session:
    """Return a session of the graph that embeds."""
    path = str(artifact.graph_path(*CPU))
    capacity = Capacity(num_blocks={}, num_state_slots=0)
    return Session(path, artifact.signatures[CPU], capacity, num_threads=num_threads)


def embedder(
    artifact: Artifact, session: Any = None, *, budget: int = 256, **settings: Any
) -> Embedder:
    """Return the task over a model folder."""
    assert artifact.embedding is not None
    size = artifact.signatures[CPU].embedding_size
    chosen = EmbedSettings(**settings).of_size(size)
    steps = EmbeddingSteps(
        session or session_of(artifact), max_num_batched_tokens=budget, on_step=lambda _: None
    )
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    encoder = TextEncoder(tokenizer, chosen, artifact.embedding)
    return Embedder(steps, encoder, chosen, pulse=Pulse("cpu"), on_result=lambda _: None)


def vectors(results: list[dict[str, Any]]) -> np.ndarray:
    """Return the embeddings of rows that all have one."""
    assert [result["error"] for result in results] == [None] * len(results)
    return np.array([result["embedding"] for result in results], np.float32)


def test_embeddings_equal_the_reference(
    sentence: tuple[SentenceTransformer, Artifact], batch: list[str]
) -> None:
    model, artifact = sentence
    ours = vectors(embedder(artifact)(batch))
    np.testing.assert_allclose(ours, encode(model, batch), rtol=0, atol=TOLERANCE)


def test_embeddings_tell_texts_apart(
    sentence: tuple[SentenceTransformer, Artifact], batch: list[str]
) -> None:
    """What is compared above is worth comparing: another text is far away."""
    ours = vectors(embedder(sentence[1])(batch))
    distances = np.abs(ours[:, None] - ours[None]).max(-1)
    assert distances[~np.eye(len(ours), dtype=bool)].min() > 100 * TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=0, atol=1e-6)


def test_prompts_are_those_of_the_model(two_sided: tuple[SentenceTransformer, Artifact]) -> None:
    model, artifact = two_sided
    batch = texts(8)
    for name in ("query", "classification"):
        known = next(known for known in PROMPTS if known.lower() == name)
        ours = vectors(embedder(artifact, prompt_name=name)(batch))
        theirs = encode(model, batch, prompt_name=known)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    ours = vectors(embedder(artifact, prompt="my task: ")(batch))
    theirs = encode(model, batch, prompt="my task: ")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_a_text_that_is_cut_is_cut_as_by_the_reference(
    two_sided: tuple[SentenceTransformer, Artifact],
) -> None:
    model, artifact = two_sided
    long = "qu" * 300
    [refused, short] = embedder(artifact)([long, "ab"])
    assert "expected at most 512 tokens, got 602" in refused["error"]
    assert refused["embedding"] is None
    assert (short["num_tokens"], short["truncated"]) == (4, False)
    [cut] = embedder(artifact, truncate=True)([long])
    assert (cut["num_tokens"], cut["truncated"], cut["error"]) == (512, True, None)
    theirs = encode(model, [long])
    np.testing.assert_allclose(vectors([cut]), theirs, rtol=0, atol=TOLERANCE)


def test_titles_of_documents(two_sided: tuple[SentenceTransformer, Artifact]) -> None:
    model, artifact = two_sided
    titled = embedder(artifact, text_column="body", title_column="title")
    rows = [{"body": "ab", "title": "news"}, {"body": "ab", "title": None}]
    theirs = encode(model, ["title: news | text: ab", "title: none | text: ab"])
    np.testing.assert_allclose(vectors(titled(rows)), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_threads", [1, 2, 16])
def test_a_row_alone_is_the_same_bits_as_in_any_batch(
    sentence: tuple[SentenceTransformer, Artifact], batch: list[str], num_threads: int
) -> None:
    _, artifact = sentence
    base = embedder(artifact, session_of(artifact, 2), budget=4096)(batch)
    session = session_of(artifact, num_threads)
    for budget in (1, 300, 4096):
        results = embedder(artifact, session, budget=budget)(batch[::-1])
        assert results[::-1] == base


def test_what_two_rows_share_is_computed_once(
    two_sided: tuple[SentenceTransformer, Artifact],
) -> None:
    _, artifact = two_sided
    session = Recorder(session_of(artifact))
    task = embedder(artifact, session, budget=1)
    results = task(["ab", "cd", "ab", "ab"])
    assert len(session.sizes) == 2
    assert results[0] == results[2] == results[3] != results[1]
    assert task.take_counts() == {"duplicate_rows": 2}
    assert task.take_counts() == {}


def test_shorter_embeddings_have_length_one(
    two_sided: tuple[SentenceTransformer, Artifact],
) -> None:
    _, artifact = two_sided
    batch = texts(5)
    whole = vectors(embedder(artifact)(batch))
    cut = vectors(embedder(artifact, truncate_dim=128)(batch))
    expected = whole[:, :128] / np.linalg.norm(whole[:, :128], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, rtol=0, atol=1e-6)
    with pytest.raises(OptionsError, match="truncate_dim: expected 160, 128, got 100"):
        embedder(artifact, truncate_dim=100)
    assert EmbedSettings(truncate_dim=256).of_size(768).truncate_dim == 256
    with pytest.raises(OptionsError, match="expected 768, 512, 256, 128, got 64"):
        EmbedSettings(truncate_dim=64).of_size(768)
    np.testing.assert_array_equal(shortened(np.zeros(4, np.float32), 2), np.zeros(2))


def test_float16(two_sided: tuple[SentenceTransformer, Artifact]) -> None:
    _, artifact = two_sided
    batch = texts(5)
    whole = vectors(embedder(artifact)(batch))
    half = vectors(embedder(artifact, embedding_dtype="float16")(batch))
    np.testing.assert_array_equal(half, whole.astype(np.float16).astype(np.float32))


class Recorder:
    """A session that writes down its steps and may spoil them."""

    def __init__(self, session: Session, factor: float = 1.0) -> None:
        self._session = session
        self.signature = session.signature
        self._factor = np.float32(factor)
        self.sizes: list[int] = []

    def embed(self, feeds: Mapping[str, np.ndarray]) -> EmbedOutput:
        self.sizes.append(len(feeds["input_ids"]))
        output = self._session.embed(feeds)
        return dataclasses.replace(output, embedding=output.embedding * self._factor)


@pytest.mark.parametrize(
    ("factor", "dtype", "error"),
    [
        (np.nan, "float32", "model: expected a finite embedding, got NaN or infinity"),
        (np.inf, "float32", "model: expected a finite embedding, got NaN or infinity"),
        (1e6, "float16", "got infinity in float16"),
    ],
)
def test_what_is_not_finite_never_leaves(
    two_sided: tuple[SentenceTransformer, Artifact], factor: float, dtype: str, error: str
) -> None:
    _, artifact = two_sided
    session = Recorder(session_of(artifact), factor)
    [result] = embedder(artifact, session, embedding_dtype=dtype)(["ab"])
    assert error in result["error"]
    assert result["embedding"] is None


def test_a_row_without_a_text_ends_alone(two_sided: tuple[SentenceTransformer, Artifact]) -> None:
    _, artifact = two_sided
    counts: list[Count] = []
    task = embedder(artifact, text_column="text")
    task._on_result = counts.append
    results = task([{"text": None}, {"text": "ab"}, {"other": "ab"}])
    assert [result["error"] is None for result in results] == [False, True, False]
    assert sum(counts, Count()) == Count(rows=3, failed=2)
    assert set(results[0]) == set(results[1]) == {"embedding", "num_tokens", "truncated", "error"}


def test_the_manifest_knows_how_texts_are_embedded(
    two_sided: tuple[SentenceTransformer, Artifact],
) -> None:
    embedding = two_sided[1].embedding
    assert embedding is not None
    assert (embedding.pooling, embedding.dense_sizes) == ("mean", (96, 160))
    assert (embedding.add_bos, embedding.add_eos, embedding.max_tokens) == (True, True, 512)
    assert embedding.prompts == PROMPTS
    assert Path(two_sided[1].path, "weights", "2_Dense.model.safetensors").exists()
