"""The real Gemma 3 270M as an encoder: the mean of its token states, as transformers has them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.tasks.text_encoder import EmbedSettings
from tests.doubles.real_model import real_artifact, real_checkpoint

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

EXPECTED = pq.read_table(Path(__file__).parents[1] / "data/embed.parquet").to_pydict()
"""Texts, the longest first, with what transformers gives (tests/data/make_embed.py)."""


def test_embeddings_are_the_mean_of_transformers_states() -> None:
    texts = EXPECTED["text"]
    path = real_artifact(real_checkpoint()).path
    embed = GemmaEmbedModelHandler(str(path), EmbedSettings(), large_model=False).load_model()
    results = embed(texts)
    assert {result["error"] for result in results} == {None}
    num_tokens = [result["num_tokens"] for result in results]
    assert num_tokens[0] > 512 > num_tokens[1]  # one text is beyond the window
    assert sum(num_tokens) > 1024  # together they take more than one step
    embeddings = [result["embedding"] for result in results]
    assert [embed([text])[0]["embedding"] for text in texts[::3]] == embeddings[::3]
    # float32; an embedding has length 1.
    np.testing.assert_allclose(embeddings, EXPECTED["embedding"], rtol=0, atol=2e-5)
