"""RecurrentGemma's graphs for CUDA: checked, then run on the CPU.

`tests.doubles.cuda_on_cpu` says what is changed for that; the recurrence is ONNX Runtime's own op
on both.
"""

import functools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.layer_types import SLIDING
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.graph.weights import inverse_frequencies
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Model, assert_logits, assert_scores, checked
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.recurrent_models import WINDOW, recurrent_model
from tests.doubles.reference import VOCAB, save_checkpoint

LENGTHS = [70, 33, 6]
"""Two beyond the window of 24, one with its edge inside a chunk. None is so short that a schedule
has it without tokens in a step, which engines never do."""
NUM_LAYERS = 3
WIDE_HEADS = {"num_attention_heads": 3, "lru_width": 192}
"""Heads of 32 channels, of which 8 pairs turn: like those of released sizes, a whole packet."""
GRAPHS = [("generate", "bfloat16"), ("generate", "float16"), ("classify", "bfloat16")]


def rounded(window: int) -> torch.nn.Module:
    """Return the model in float32 with weights that bfloat16 holds."""
    model = recurrent_model(window, NUM_LAYERS, **WIDE_HEADS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@functools.cache
def model_in(folder: Path) -> Model:
    checkpoint = read_checkpoint(save_checkpoint(rounded(WINDOW), folder / "checkpoint"))
    weights = {
        name: np.concatenate([np.asarray(c, np.float32) for c in stored.chunks()])
        + np.float32(checkpoint.norm_offset if name.endswith("norm.weight") else 0)
        for name, stored in checkpoint.tensors.items()
    }
    weights[f"rotary.{SLIDING}.inv_freq"] = inverse_frequencies(checkpoint.config, SLIDING)
    reference = rounded(WINDOW + 1)
    return Model("recurrent_gemma", reference, checkpoint.config, None, weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("recurrent"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize(("task", "dtype"), GRAPHS)
def test_each_node_has_a_kernel_for_cuda(model: Model, task: str, dtype: str) -> None:
    found = unplaced(checked(model.graph(task, dtype)[0]))
    # Computed from weights alone, so on the CPU and once, when the graph is loaded.
    assert {node.split()[0] for node in found} <= {"Softplus"}, found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_the_reference_s(model: Model, prompts: list[list[int]], dtype: str) -> None:
    """In all schedules, so with sequences of several lengths side by side."""
    graph, signature = model.graph("generate", dtype)
    assert_logits(model.session(graph), signature, model.reference, prompts)


def test_scores_are_the_reference_s(model: Model, prompts: list[list[int]]) -> None:
    graph, signature = model.graph("classify", "bfloat16")
    assert_scores(model.session(graph), signature, model.reference, prompts)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_coded_matrices_are_those_of_the_rounded_model(
    prompts: list[list[int]], tmp_path: Path, precision: str
) -> None:
    """Gates, their biases and convolutions keep their numbers; products keep their biases."""
    source = save_checkpoint(rounded(WINDOW), tmp_path / "checkpoint")
    export(source, tmp_path / "model", device="cuda", precision=precision, tasks=("generate",))
    artifact = Artifact.open(tmp_path / "model")
    file = cuda_file_on_cpu(artifact.graph_path("generate", "cuda"), tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    reference = rounded(WINDOW + 1)
    kind = {"int4": GGMLQuantizationType.Q4_0, "int8": GGMLQuantizationType.Q8_0}[precision]
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 2 and not name.endswith("bias"):
                own = GGMLQuantizationType.Q8_0 if "embed_tokens" in name else kind
                rounded_numbers = dequantize(quantize(parameter.numpy(), own), own)
                parameter.copy_(torch.from_numpy(rounded_numbers))
    assert_logits(session, artifact.signature("generate", "cuda"), reference, prompts)
