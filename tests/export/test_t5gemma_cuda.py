"""T5Gemma's and T5Gemma 2's graphs for CUDA: checked, then run on the CPU, beside transformers.

`tests.doubles.cuda_on_cpu` says what is changed for that.
"""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from beam_gemma.engine.embedding_engine import feeds as packed
from beam_gemma.model.graph_tensors import Head
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_shapes import side_by_side
from export.ops.source_attention import source_attention
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Stepper
from tests.doubles.cuda_sources import Exported, exported_pair, rounded_model
from tests.doubles.encoder_decoder_models import VOCAB, WINDOWS, encoder_decoder_outputs
from tests.doubles.ragged import Feeds, run_schedule
from tests.doubles.ragged_sources import SourceFeeder

SOURCES = (9, 70, 1)
TARGETS = (3, 15, 12)
"""Up to two windows and a half; the last is longer than its source."""
WINDOW = WINDOWS["decoder"]
PRECISIONS = [("t5gemma", "bf16"), ("t5gemma2", "fp16")]
"""One of each: in the other type, no node is of a kind that Gemma's graphs are without."""


def sequences(name: str, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB[name] - 20, n).tolist() for n in lengths]


@functools.cache
def expected(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the encoder's states and the logits of each sequence."""
    model = rounded_model(name)
    pairs = zip(sequences(name, SOURCES, 7), sequences(name, TARGETS, 8), strict=True)
    return [encoder_decoder_outputs(model, source, target) for source, target in pairs]


def session(pair: Exported, head: Head) -> tuple[onnxruntime.InferenceSession, Signature]:
    path, signature = pair.graph(head)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return (
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]),
        signature,
    )


def schedule(first: int) -> list[list[tuple[int, int]]]:
    """Return steps: so many tokens of each sequence at first, then one by one."""
    rest = range(first, max(TARGETS))
    return [
        [(i, min(first, n)) for i, n in enumerate(TARGETS)],
        *([(i, 1) for i, n in enumerate(TARGETS) if place < n] for place in rest),
    ]


@pytest.mark.parametrize("head", ["generate", "encode"])
@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_each_node_has_a_kernel_for_cuda(name: str, precision: str, head: Head) -> None:
    artifact = exported_pair(name, "cuda", precision).artifact
    path = artifact.graph_path(head, "cuda")
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path))
    assert unplaced(model) == []


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_the_encoder_gives_the_reference_s_states(name: str, precision: str) -> None:
    """In one step, side by side."""
    encoder, signature = session(exported_pair(name, "cuda", precision), "encode")
    feeds = side_by_side(packed(sequences(name, SOURCES, 7)))
    if "inputs_embeds" in signature.optional_inputs:
        feeds["inputs_embeds"] = np.zeros((1, signature.hidden_size), np.float32)
        feeds["embeds_rows"] = np.full(len(feeds["input_ids"]), -1)
    states = Stepper(encoder, signature, {}).run(feeds)["source_states"]
    exact = np.concatenate([states for states, _ in expected(name)])
    # float32 on both sides; states are of order 1.
    np.testing.assert_allclose(states, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("first", [1, WINDOW])
@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_the_decoder_gives_the_reference_s_logits(name: str, precision: str, first: int) -> None:
    """Tokens go round in the windows of a T5Gemma 2."""
    decoder, signature = session(exported_pair(name, "cuda", precision), "generate")
    feeder = SourceFeeder(signature, [states for states, _ in expected(name)], max(TARGETS))
    stepper = Stepper(decoder, signature, feeder.state())
    targets = sequences(name, TARGETS, 8)

    def run(feeds: Feeds) -> np.ndarray:
        return stepper.run(feeds)["logits"]

    for got, (_, exact) in zip(
        run_schedule(schedule(first), targets, feeder, run), expected(name), strict=True
    ):
        # float32 on both sides.
        np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5)


def test_attention_over_sources_is_that_of_whole_sequences() -> None:
    """Of a query at the last of its sequence's cells, whatever it is a row of."""
    generator = torch.Generator().manual_seed(1)
    heads, dim, block = 2, 8, 4
    query, key, value = (
        torch.randn(n, heads * dim, generator=generator, dtype=torch.float64) for n in (2, 7, 7)
    )
    caches = [torch.zeros(5, block, heads, dim, dtype=torch.float64) for _ in range(2)]
    output, keys, _ = source_attention(
        query, key, value, *caches,
        torch.tensor([0, 1, 2, 7], dtype=torch.int32), torch.tensor([4, 0, 0]),
        torch.tensor([[2, 3], [4, 0], [0, 0]]),
        torch.tensor([-1, 16, 8, 9, 10, 11, 12]),
        torch.tensor([0, 1, 0, 0, 0, 0, 0]), torch.arange(2), heads, heads, 0.5, 0.0,
        torch.tensor([5, 8, 0]),
    )  # fmt: skip
    context = key[2:7].view(5, heads, dim)
    scores = torch.einsum("hd,khd->hk", query[0].view(heads, dim), context) * 0.5
    weights = scores.softmax(1)
    wanted = torch.einsum("hk,khd->hd", weights, value[2:7].view(5, heads, dim)).flatten()
    # float64.
    torch.testing.assert_close(output[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(output[1], value[1])
    assert not keys[0].any(), "the padding block"
    torch.testing.assert_close(keys[4, 0].flatten(), key[1])


def test_a_quantized_decoder_is_near_the_reference() -> None:
    """Of T5Gemma 2, whose products take new tokens and source tokens at once."""
    decoder, signature = session(exported_pair("t5gemma2", "cuda", "int8"), "generate")
    feeder = SourceFeeder(signature, [states for states, _ in expected("t5gemma2")], max(TARGETS))
    stepper = Stepper(decoder, signature, feeder.state())
    targets = [ids[:WINDOW] for ids in sequences("t5gemma2", TARGETS, 8)]
    feeds = feeder.feeds(list(enumerate(targets)))
    exact = [logits[:WINDOW] for _, logits in expected("t5gemma2")]
    error = np.abs(stepper.run(feeds)["logits"] - np.concatenate(exact)).mean()
    assert 0 < error < 0.02  # float32; weights of 8 bits, logits from -2 to 2
