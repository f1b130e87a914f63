"""The released sizes that see: their parameters, and the graph of the tower at full size."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from beam_gemma.model.config import GemmaConfig
from export.checkpoints.released_sizes import VISION_SIZES, Size
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import PATCHES, is_of_pictures
from tests.doubles.exported_tower import traced_tower

NAMED = {size.name: size for size in VISION_SIZES}
CLASSES = {
    "gemma3": (transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration),
    "paligemma": (transformers.PaliGemmaConfig, transformers.PaliGemmaForConditionalGeneration),
}


@pytest.mark.parametrize("size", VISION_SIZES, ids=lambda size: size.name)
def test_shapes_have_the_published_number_of_parameters(size: Size) -> None:
    count = sum(math.prod(shape) for shape in size.tensor_shapes().values())
    assert size.num_parameters in (count, None)


@pytest.mark.parametrize("name", ["Gemma 3 12B with pictures", "PaliGemma 2 10B 448"])
def test_shapes_are_those_of_transformers(name: str) -> None:
    """On a device without memory."""
    size = NAMED[name]
    config_class, model_class = CLASSES[size.raw["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class(**size.raw))
    theirs = {}
    for parameter, value in model.named_parameters():
        ours = parameter.removeprefix("model.").removeprefix("language_model.")
        theirs[ours] = tuple(value.shape)
    theirs[PATCHES] = (theirs[PATCHES][0], math.prod(theirs[PATCHES][1:]))
    assert theirs == size.tensor_shapes()


@pytest.mark.parametrize("name", ["Gemma 3 4B with pictures", "PaliGemma 3B 224"])
def test_tower_is_traced_at_full_size_without_weights(name: str) -> None:
    size = NAMED[name]
    checkpoint = checkpoint_of(size.config, size)
    graph = traced_tower(checkpoint, "cuda", "bfloat16").graph
    found = {n: tuple(v.shape) for n, v in graph.initializers.items() if v.const_value is None}
    assert found == {n: s for n, s in size.tensor_shapes().items() if is_of_pictures(n)}
    # All else are shapes and what normalizes pixels.
    others = [v.const_value.nbytes for v in graph.initializers.values() if v.const_value]
    assert sum(others) < 1000


def checkpoint_of(config: GemmaConfig, size: Size) -> Checkpoint:
    return Checkpoint(
        name=size.name,
        path=Path("none"),
        format="safetensors",
        config=config,
        tensors={},
        norm_offset=1.0,
        tokenizer_model=bytes,
        eos_token_ids=(1,),
        chat_template=None,
        vision=size.vision,
    )
