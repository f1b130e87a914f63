"""The real Gemma 3 270M as an encoder: the mean of its token states, as transformers has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.inference.handlers import GemmaEmbedModelHandler
from beam_gemma.tasks.text_encoder import EmbedSettings
from tests.doubles.real_model import real_artifact, real_checkpoint
from tests.doubles.reference import real_model

pytestmark = [pytest.mark.weights, pytest.mark.timeout(600)]

PROMPTS = json.loads((Path(__file__).parents[1] / "data/prompts64.json").read_text())
TEXTS = sorted(PROMPTS, key=len)[::-6]
"""From a few tokens to several hundred, the longest beyond the window of 512."""


@pytest.fixture(scope="module")
def handler() -> GemmaEmbedModelHandler:
    path = real_artifact(real_checkpoint()).path
    return GemmaEmbedModelHandler(str(path), EmbedSettings(), large_model=False)


def test_embeddings_are_the_mean_of_transformers_states(handler: GemmaEmbedModelHandler) -> None:
    embed = handler.load_model()
    results = embed(TEXTS)
    assert {result["error"] for result in results} == {None}
    assert max(result["num_tokens"] for result in results) > 512
    alone = [embed([text])[0]["embedding"] for text in TEXTS[::3]]
    assert alone == [result["embedding"] for result in results[::3]]
    model = real_model(real_checkpoint()).model
    encode = handler.encoder(real_artifact(real_checkpoint()))
    for text, result in zip(TEXTS, results, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([encode(text).token_ids])).last_hidden_state[0]
        mean = torch.nn.functional.normalize(states.double().mean(dim=0), dim=0).numpy()
        # float32; an embedding has length 1.
        np.testing.assert_allclose(result["embedding"], mean, rtol=0, atol=2e-5)
