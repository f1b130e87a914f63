"""Graphs of Gemma 3n and Gemma 4 for CUDA: checked, then run on the CPU, beside transformers.

`tests.doubles.cuda_on_cpu` says what is changed for that. A float16 graph has its residual stream
and constants in float32, so it is compared to the last digits; the constants of a bfloat16 graph
have 8 binary digits.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from beam_gemma.model.signature import Signature
from export.modules.layers import RMSNorm
from export.modules.per_layer import PerLayerGate
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Stepper, assert_logits, assert_scores, checked
from tests.doubles.cuda_newer_models import (
    graph_on_cpu,
    newer_cuda_model,
    newer_export,
    newer_reference,
)
from tests.doubles.ragged import Feeder, Feeds
from tests.doubles.reference import VOCAB, logits_of

LENGTHS = [70, 33, 6]
"""Two beyond the window of 24, one with its edge inside a chunk."""
GRAPHS = [
    ("gemma4_e2b", "float16"),
    ("gemma4_e2b", "bfloat16"),
    ("gemma4_moe", "float16"),
    ("gemma4_moe", "bfloat16"),
    ("gemma4_wide_heads", "bfloat16"),
    ("gemma3n", "float16"),
    ("gemma3n", "bfloat16"),
]
EXACT = [case for case in GRAPHS if case[1] == "float16" or case[0] == "gemma4_wide_heads"]
CODED = [
    ("gemma4_e2b", "int8"),
    ("gemma4_moe", "int8"),
    ("gemma4_moe", "int4"),
    ("gemma3n", "int4"),
]
Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
OF_EMBEDDINGS = ("embed_tokens.weight", "embed_tokens_per_layer.weight")
"""Ends of the names of matrices that have 8 bits in any precision."""


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize(("name", "dtype"), GRAPHS)
def test_each_node_has_a_kernel_for_cuda(name: str, dtype: str) -> None:
    graph, _ = newer_cuda_model(name).graph("generate", dtype)
    assert unplaced(checked(graph)) == []


@pytest.mark.parametrize(("name", "dtype"), EXACT)
def test_logits_are_the_reference_s(name: str, dtype: str) -> None:
    """In all schedules, so that layers without caches get all rows of a step and few of them."""
    model = newer_cuda_model(name)
    graph, signature = model.graph("generate", dtype)
    assert_logits(model.session(graph), signature, model.reference, prompts())


@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma4_moe", "gemma3n"])
def test_logits_in_bfloat16_are_the_reference_s_but_for_constants(name: str) -> None:
    model = newer_cuda_model(name)
    graph, signature = model.graph("generate", "bfloat16")
    got = first_logits(model.session(graph), signature, prompts())
    exact = np.concatenate([logits_of(model.reference, ids) for ids in prompts()])
    # float32 on both sides but for constants of bfloat16; logits from -5 to 5.
    np.testing.assert_allclose(got, exact, rtol=0, atol=0.02)


def test_scores_are_the_reference_s() -> None:
    model = newer_cuda_model("gemma4_e2b")
    graph, signature = model.graph("classify", "float16")
    assert_scores(model.session(graph), signature, model.reference, prompts())


@pytest.mark.parametrize(("name", "precision"), CODED)
def test_coded_matrices_are_those_of_the_rounded_model(name: str, precision: str) -> None:
    """Those of experts and the table of per-layer embeddings too; routers keep their numbers."""
    artifact = newer_export(name, precision)
    session = onnxruntime.InferenceSession(
        str(graph_on_cpu(artifact, "generate")), providers=["CPUExecutionProvider"]
    )
    reference = newer_reference(name)
    round_matrices(reference, {"int8": Q8, "int4": Q4}[precision])
    assert_logits(session, artifact.signature("generate", "cuda"), reference, prompts())


def round_matrices(model: torch.nn.Module, kind: GGMLQuantizationType) -> None:
    """Have a model the numbers that codes stand for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "router" in name or "coefs" in name:
                continue
            own = Q8 if name.endswith(OF_EMBEDDINGS) else kind
            numbers = dequantize(quantize(parameter.numpy(), own), own)
            parameter.copy_(torch.from_numpy(numbers).view(parameter.shape))


def first_logits(
    session: onnxruntime.InferenceSession, signature: Signature, sequences: list[list[int]]
) -> np.ndarray:
    """Return the logits of all tokens, computed in one step."""
    feeder = Feeder(signature, len(sequences), max(map(len, sequences)))
    feeds = feeder.feeds(list(enumerate(sequences)))
    return Stepper(session, signature, feeder.state()).run(feeds)["logits"]


def test_a_padding_row_gives_what_it_reads_to_nobody() -> None:
    """Whatever row 0 is: its own sequence's first cell is all that a padding row reads."""
    model = newer_cuda_model("gemma4_e2b")
    graph, signature = model.graph("generate", "float16")
    session = model.session(graph)
    feeder = Feeder(signature, 2, max(LENGTHS))
    feeds = feeder.feeds(list(enumerate(prompts()[:2])), all_rows=False)
    alone = Stepper(session, signature, feeder.state()).run(feeds)
    padded = Stepper(session, signature, feeder.state()).run(with_padding_rows(feeds, 3))
    for name in ("logits", "topk_ids", "chosen_ids"):
        np.testing.assert_array_equal(padded[name][:2], alone[name])
    assert np.isfinite(padded["logits"]).all()


def with_padding_rows(feeds: Feeds, count: int) -> Feeds:
    """Return a step's inputs with rows that repeat row 0 but for the past of its sequence."""
    padded = dict(feeds)
    for name in ("logit_rows", "row_sequences", "row_past_seqlens", *CHOICES):
        padded[name] = np.pad(feeds[name], (0, count))
    padded["logit_slots"][-count:] = 2
    rows = len(padded["logit_rows"])
    padded["row_cu_seqlens"] = np.arange(rows + 1, dtype=np.int32)
    padded["probability_rows"] = padded["full_rows"] = np.arange(rows)
    return padded


CHOICES = ("logit_slots", "temperatures", "uniforms", "top_ks", "top_ps")


@pytest.mark.parametrize("name", ["gemma4_wide_heads", "gemma4_e2b"])
def test_attention_with_wide_heads_takes_no_bounds(name: str) -> None:
    """With bounds, ONNX Runtime makes room for all sequences times the longest of them."""
    graph, signature = newer_cuda_model(name).graph("generate", "bfloat16")
    nodes = [n for n in graph.graph if n.op_type in ("RaggedAttention", "CachedAttention")]
    names = [{value.name for value in node.inputs if value} for node in nodes]
    bounded = ["attention_metadata" in found for found in names]
    assert bounded == ([True, False] if name == "gemma4_wide_heads" else [True] * 6)
    assert signature.gathered_heads == (4 if name == "gemma4_wide_heads" else 0)


class Gate(PerLayerGate):
    """The part of a layer that is tested, with random weights."""

    def __init__(self, inner: torch.dtype | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner = inner
        self.per_layer_input_gate = matrix(96, 32, generator)
        self.per_layer_projection = matrix(32, 96, generator)
        self.post_per_layer_input_norm = RMSNorm(96, 1e-6)
        with torch.no_grad():
            self.post_per_layer_input_norm.weight.copy_(torch.rand(96, generator=generator))


def matrix(inputs: int, outputs: int, generator: torch.Generator) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        numbers = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        linear.weight.copy_(numbers.half())
    return linear


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])
@torch.no_grad()
def test_streams_beyond_float16_gate_per_layer_embeddings(magnitude: float) -> None:
    """Gemma 3's stream exceeds 65,504, and small numbers keep their digits."""
    generator = torch.Generator().manual_seed(2)
    x = magnitude * torch.randn(7, 96, generator=generator)
    inputs = torch.randn(7, 32, generator=generator)
    exact = Gate(None).double().gated(x.double(), inputs.double())
    gate = Gate(torch.float16)
    for linear in (gate.per_layer_input_gate, gate.per_layer_projection):
        linear.half()
    got = gate.gated(x, inputs)
    assert got.dtype == torch.float32
    # float16 products, normalized: values of order 1.
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-3)


def test_a_table_is_an_input_with_its_place_in_a_file() -> None:
    """Linked where the checkpoint has it; two inputs where it is coded."""
    for precision, names in (
        ("bf16", ["embed_tokens_per_layer.weight"]),
        ("int8", [f"embed_tokens_per_layer.weight:8:{p}" for p in ("codes", "lookup_scales")]),
    ):
        artifact = newer_export("gemma4_e2b", precision)
        signature = artifact.signature("generate", "cuda")
        assert sorted(table.name for table in signature.tables) == sorted(names)
        proto = onnx.load(artifact.graph_path("generate", "cuda"), load_external_data=False)
        assert set(names) <= {value.name for value in proto.graph.input}
        assert not {i.name for i in proto.graph.initializer} & set(names)
