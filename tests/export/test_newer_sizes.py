"""The released sizes of Gemma 3n and Gemma 4: their parameters and shapes."""

import math

import pytest
import torch
import transformers

from export.checkpoints.newer_sizes import NEWER_SIZES, Size
from export.checkpoints.tensors import HEAD, TABLE

PUBLISHED = {"Gemma 4 26B-A4B": 25.2, "Gemma 4 31B": 30.7}
"""Parameters in billions by the model card, which rounds them, and counts the tower as well."""
IN_EFFECT = {"Gemma 4 E2B": 2.3}
"""The same without the table of per-layer embeddings."""
ACTIVE = {"Gemma 4 26B-A4B": 3.8}
"""The same with the experts that a token takes alone."""

WITH_TOWERS = {"Gemma 3n E2B": 5_439_595_456, "Gemma 3n E4B": 7_850_135_376}
"""Parameters of whole models by KerasHub's presets."""
TOWERS = 983_438_688
"""Those of the towers of Gemma 3n: sound 681,348,640 as transformers counts them, their projections
7,805,952, and pictures the rest, which is the same in both sizes."""
CLASSES = {
    "gemma3n_text": (transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM),
    "gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM),
}


def count(size: Size) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in size.tensor_shapes().items()}


@pytest.mark.parametrize("size", NEWER_SIZES, ids=lambda size: size.name)
def test_shapes_are_those_of_transformers(size: Size) -> None:
    """On a device without memory."""
    config_class, model_class = CLASSES[size.raw["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class(**size.raw))
    theirs = {n.removeprefix("model."): tuple(t.shape) for n, t in model.state_dict().items()}
    assert theirs.pop(HEAD) == theirs["embed_tokens.weight"]
    assert theirs == size.tensor_shapes()


def test_numbers_of_parameters_are_those_of_the_model_card() -> None:
    counts = {size.name: count(size) for size in NEWER_SIZES}
    whole = {name: sum(of.values()) for name, of in counts.items()}
    for name, billions in PUBLISHED.items():
        assert round(whole[name] / 1e9, 1) == billions
    for name, billions in IN_EFFECT.items():
        assert round((whole[name] - counts[name][TABLE]) / 1e9, 1) == billions
    for size in NEWER_SIZES:
        if size.name in ACTIVE:
            config = size.config
            assert config.num_experts is not None
            assert config.top_k_experts is not None
            experts = sum(n for name, n in counts[size.name].items() if ".experts." in name)
            idle = experts * (config.num_experts - config.top_k_experts) // config.num_experts
            assert round((whole[size.name] - idle) / 1e9, 1) == ACTIVE[size.name]


def test_a_gemma3n_has_as_many_as_its_preset_says() -> None:
    """There, and in published files, layers that share keys and values have matrices for them."""
    for size in NEWER_SIZES:
        if size.name in WITH_TOWERS:
            config, counts = size.config, count(size)
            own = [n for name, n in counts.items() if name.startswith("layers.0.self_attn.")]
            queries = [n for name, n in counts.items() if name.startswith("layers.29.self_attn.")]
            unused = config.num_kv_shared_layers * (sum(own) - sum(queries))
            assert sum(counts.values()) + unused + TOWERS == WITH_TOWERS[size.name]
