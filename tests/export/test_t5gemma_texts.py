"""What an encoder makes of whole texts alone: embeddings, and states of sources with pictures."""

import contextlib
import functools

import numpy as np
import pytest
import torch

from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.signatures import vision_signature
from export.graph.tasks import graph_module
from tests.doubles.checkpoint_files import values
from tests.doubles.encoder_decoder_models import (
    encoder_decoder_outputs,
    source_encoder,
    tiny_encoder_decoder,
    tiny_pair,
)
from tests.doubles.ragged import Feeds
from tests.doubles.reference import float64_throughout
from tests.doubles.vision_models import BEGIN_ID, END_ID, NUM_IMAGE_TOKENS, SOFT_ID

TEXTS = [np.random.default_rng(n).integers(3, 300, n).tolist() for n in (9, 70, 1)]
PICTURE = [BEGIN_ID, *[SOFT_ID] * NUM_IMAGE_TOKENS, END_ID]
SHOWN = [[2, 50, *PICTURE, 60, 61, *PICTURE, 62, 63], [2, 70, 71]]
"""A source with two pictures and one without."""
SIZE = 56


def session(name: str, head: str) -> Session:
    artifact = tiny_pair(name).artifact
    signature = artifact.signature(head, "cpu")
    nothing = Capacity(num_blocks={}, num_state_slots=0)
    return Session(str(artifact.graph_path(head, "cpu")), signature, nothing)


def packed(texts: list[list[int]]) -> Feeds:
    return {
        "input_ids": np.concatenate(texts).astype(np.int64),
        "cu_seqlens": np.cumsum([0, *map(len, texts)]).astype(np.int32),
    }


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_an_embedding_is_the_mean_of_the_references_states(name: str) -> None:
    output = session(name, "embed").embed(packed(TEXTS))
    model = tiny_encoder_decoder(name).double()
    for text, embedding, first in zip(TEXTS, output.embedding, output.first_state, strict=True):
        states, _ = encoder_decoder_outputs(model, text, [2])
        mean = states.mean(axis=0)
        # float32, length 1; states have a length of about 8.
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), rtol=0, atol=1e-6)
        np.testing.assert_allclose(first, states[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_bits_of_an_embedding_do_not_depend_on_company(name: str) -> None:
    one = session(name, "embed")
    together = one.embed(packed(TEXTS)).embedding
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(one.embed(packed([text])).embedding[0], together[i])


@functools.cache
def pixels() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)


@torch.no_grad()
def shown_to_the_reference(dtype: torch.dtype) -> list[np.ndarray]:
    """Return the states of the sources with pictures."""
    model = tiny_encoder_decoder("t5gemma2").to(dtype)
    colors = (torch.from_numpy(pixels()).to(dtype) / 255 - 0.5) / 0.5
    found = []
    for ids, shown in zip(SHOWN, (colors, None), strict=True):
        with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
            outputs = model.model.encoder(input_ids=torch.tensor([ids]), pixel_values=shown)
        found.append(outputs.last_hidden_state[0].numpy())
    return found


def with_pictures(features: np.ndarray) -> Feeds:
    """Return the feeds of both sources, with the features of pictures [N, L, D]."""
    feeds = packed(SHOWN)
    is_soft = feeds["input_ids"] == SOFT_ID
    feeds["inputs_embeds"] = features.reshape(-1, features.shape[-1])
    feeds["embeds_rows"] = np.where(is_soft, np.cumsum(is_soft) - 1, -1)
    return feeds


@torch.no_grad()
def test_sources_with_pictures_in_float64_equal_the_reference() -> None:
    """From pixels to states."""
    pair = tiny_pair("t5gemma2")
    checkpoint = pair.checkpoint
    config, vision = checkpoint.config, checkpoint.vision
    assert vision is not None
    signature = vision_signature(config, vision, device="cpu", dtype="float32")
    tower = graph_module(config, None, signature, vision, None, checkpoint.encoder).double().eval()
    tower.load_state_dict(
        {
            name: torch.from_numpy(
                values(t).astype(np.float64) + name.endswith("soft_emb_norm.weight")
            )
            for name, t in checkpoint.tensors.items()
            if is_of_pictures(name)
        }
    )
    features, _ = tower({"pixels": torch.from_numpy(pixels())}, {})
    feeds = with_pictures(features["image_features"].numpy())
    outputs, _ = source_encoder(pair, torch.float64)(
        {name: torch.from_numpy(array) for name, array in feeds.items()}, {}
    )
    states = np.split(outputs["source_states"].numpy(), feeds["cu_seqlens"][1:-1])
    expected = shown_to_the_reference(torch.float64)
    for ours, theirs in zip(states, expected, strict=True):
        # float64.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_graphs_with_pictures_are_as_exact_as_the_reference() -> None:
    tower, encoder = session("t5gemma2", "vision"), session("t5gemma2", "encode")
    features = tower._run({"pixels": pixels()}, with_logits=False)["image_features"]
    feeds = with_pictures(features)
    states = encoder._run(feeds, with_logits=False)["source_states"]
    exact = shown_to_the_reference(torch.float64)
    rounded = shown_to_the_reference(torch.float32)
    for ours, theirs, truth in zip(
        np.split(states, feeds["cu_seqlens"][1:-1]), rounded, exact, strict=True
    ):
        # float32: at most twice the reference's error.
        assert np.abs(ours - truth).max() <= 2 * np.abs(theirs - truth).max()
