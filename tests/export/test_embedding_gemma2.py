"""EmbeddingGemma 2 from the reference to the exported graph: our module, then ONNX Runtime.

Texts are as long as what a layer with a window sees, give or take a token, and longer.
"""

import functools

import numpy as np
import pytest
import torch

from beam_gemma.engine.embedding_engine import EmbeddingSteps, check_sight, feeds
from beam_gemma.model.graph_tensors import Device
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.step_shapes import side_by_side
from tests.doubles.embedding_gemma2_models import (
    RADIUS,
    SHAPES,
    embedding_of,
    encoder_module,
    text_model,
    tiny_embedder,
    token_states,
)

LENGTHS = (1, 2, RADIUS, RADIUS + 1, RADIUS + 2, 2 * RADIUS + 1, 2 * RADIUS + 2, 70, 150)
TEXTS = [np.random.default_rng(n).integers(3, 300, n).tolist() for n in LENGTHS]


@functools.cache
def reference_states(name: str, dtype: torch.dtype) -> list[np.ndarray]:
    """Return the reference's projected states [T, W] of each text."""
    model = text_model(name).to(dtype)
    return [token_states(model, text) for text in TEXTS]


@functools.cache
def session(name: str, num_threads: int) -> Session:
    artifact = tiny_embedder(name).artifact
    path = str(artifact.graph_path("embed", "cpu"))
    nothing = Capacity(num_blocks={}, num_state_slots=0)
    return Session(path, artifact.signature("embed", "cpu"), nothing, num_threads=num_threads)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_module_in_float64_equals_the_reference(name: str, device: Device) -> None:
    """The state of each token, and embeddings: all texts in one step, packed or padded."""
    module = encoder_module(tiny_embedder(name), device, torch.float64)
    arrays = feeds(TEXTS) if device == "cpu" else side_by_side(feeds(TEXTS))
    step = {key: torch.from_numpy(array) for key, array in arrays.items()}
    states = module.norm(module.states(step)[0])
    outputs, _ = module(step, {})
    projected = np.split(module.dense[0](states).numpy(), np.cumsum(LENGTHS)[:-1])
    exact = reference_states(name, torch.float64)
    for ours, theirs, embedding in zip(projected, exact, outputs["embedding"], strict=True):
        # float64.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        np.testing.assert_allclose(embedding, embedding_of(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_graph_is_as_exact_as_the_reference(name: str) -> None:
    ours = session(name, 2).embed(feeds(TEXTS)).embedding
    exact = np.stack([embedding_of(s) for s in reference_states(name, torch.float64)])
    theirs = np.stack([embedding_of(s) for s in reference_states(name, torch.float32)])
    our_error, their_error = np.abs(ours - exact).max(), np.abs(theirs - exact).max()
    assert our_error <= 2 * their_error, f"{our_error:.2e} against {their_error:.2e}, float32"
    cosines = (ours * exact).sum(axis=1)
    # float32; both have length 1.
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_company_or_threads(name: str) -> None:
    together = session(name, 2).embed(feeds(TEXTS))
    for num_threads in (1, 2):
        one = session(name, num_threads)
        for order in (TEXTS[::-1], TEXTS[3:6], TEXTS[:1] * 70 + TEXTS[5:]):
            outputs = one.embed(feeds(order))
            for text, embedding in zip(order, outputs.embedding, strict=True):
                expected = together.embedding[TEXTS.index(text)]
                np.testing.assert_array_equal(embedding, expected)
        for text, embedding, first in zip(
            TEXTS, together.embedding, together.first_state, strict=True
        ):
            alone = one.embed(feeds([text]))
            np.testing.assert_array_equal(alone.embedding[0], embedding)
            np.testing.assert_array_equal(alone.first_state[0], first)


def test_steps_give_each_text_its_embedding() -> None:
    """However many tokens a step takes."""
    expected = session("embedding_gemma2", 2).embed(feeds(TEXTS)).embedding
    for budget in (1, 100, 4096):
        steps = EmbeddingSteps(
            session("embedding_gemma2", 2), max_num_batched_tokens=budget, on_step=lambda _: None
        )
        found = dict(steps(TEXTS))
        assert [found[i].tolist() for i in range(len(TEXTS))] == expected.tolist()


def test_the_first_token_sees_the_last_one() -> None:
    check_sight(session("embedding_gemma2", 2), [5, 6, 7], is_two_sided=True)
