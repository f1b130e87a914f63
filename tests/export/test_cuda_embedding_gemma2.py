"""The graphs of an EmbeddingGemma 2 for CUDA: checked, then run on the CPU.

Heads are as wide as those of the release, and texts are longer than the window. A mask says what a
query reaches, so ONNX Runtime takes its memory-efficient kernel, for heads of 512 channels too.
"""

import functools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from beam_gemma.engine.embedding_engine import feeds
from beam_gemma.runtime.step_shapes import side_by_side
from export.graph.weights import inverse_frequencies
from tests.doubles.checkpoint_files import values
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import DTYPES, Model, checked
from tests.doubles.embedding_gemma2_models import (
    WIDE_HEADS,
    embedding_of,
    text_model,
    tiny_embedder,
    token_states,
)

NAME = "embedding_gemma2_wide"
TEXTS = [np.random.default_rng(n).integers(3, 300, n).tolist() for n in (70, 25, 5, 1)]


@functools.cache
def rounded_model() -> Model:
    """Return the model with weights that bfloat16 holds; what no matrix is stays exact."""
    reference = text_model(NAME)
    with torch.no_grad():
        for tensor in (*reference.parameters(), *(x.layer_scalar for x in reference.layers)):
            tensor.copy_(tensor.to(torch.bfloat16))
    checkpoint = tiny_embedder(NAME).checkpoint
    weights = {
        name: torch.from_numpy(values(stored)).to(torch.bfloat16).float().numpy()
        for name, stored in checkpoint.tensors.items()
    }
    for group in checkpoint.config.groups:
        weights[f"rotary.{group}.inv_freq"] = inverse_frequencies(checkpoint.config, group)
    return Model(NAME, reference, checkpoint.config, checkpoint.embedding, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_are_the_reference_s(dtype: str) -> None:
    model = rounded_model()
    graph, _ = model.graph("embed", dtype)
    assert unplaced(checked(graph)) == [], "nodes without a kernel for CUDA"
    session = model.session(graph)
    [found, first] = session.run(["embedding", "first_state"], side_by_side(feeds(TEXTS)))
    assert first.shape == (len(TEXTS), WIDE_HEADS["hidden_size"])
    for ours, text in zip(found, TEXTS, strict=True):
        expected = embedding_of(token_states(model.reference, text))
        # float32 on both sides; length 1.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_each_attention_has_its_heads_and_a_mask_of_booleans() -> None:
    """What the memory-efficient kernel takes: no causal attention, and widths of up to 1,024."""
    graph, _ = rounded_model().graph("embed", "bfloat16")
    nodes = [node for node in graph.graph if node.op_type == "PaddedAttention"]
    heads = [node.attributes["num_kv_heads"].as_int() for node in nodes]
    assert heads == [WIDE_HEADS["num_key_value_heads"], WIDE_HEADS["num_global_key_value_heads"]]
    masks = [node.inputs[3] for node in nodes]
    assert [mask.dtype for mask in masks if mask is not None] == [ir.DataType.BOOL] * 2
