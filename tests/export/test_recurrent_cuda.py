"""RecurrentGemma's graphs for CUDA: checked, then run on the CPU.

`tests.doubles.cuda_on_cpu` says what is changed for that; the recurrence is ONNX Runtime's own op
on both.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.config import SLIDING
from beam_gemma.model.signature import Signature
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.graph.weights import inverse_frequencies
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import Model, Stepper, assert_logits, assert_scores, checked
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.once import exporter_digest, kept
from tests.doubles.ragged import Feeder
from tests.doubles.recurrent_models import WINDOW, recurrent_model
from tests.doubles.reference import VOCAB, save_checkpoint
from tests.doubles.reference import logits_of

LENGTHS = [70, 33, 5]
"""Two beyond the window of 24, one with its edge inside a chunk."""
NUM_LAYERS = 3
GRAPHS = [("generate", "bfloat16"), ("generate", "float16"), ("classify", "bfloat16")]


def rounded(window: int) -> torch.nn.Module:
    """Return the model in float32 with weights that bfloat16 holds."""
    model = recurrent_model(window, NUM_LAYERS)
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
    assert unplaced(checked(model.graph(task, dtype)[0])) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_the_reference_s(model: Model, prompts: list[list[int]], dtype: str) -> None:
    """In all schedules, so with sequences of several lengths side by side."""
    graph, signature = model.graph("generate", dtype)
    assert_logits(model.session(graph), signature, model.reference, prompts)


def test_scores_are_the_reference_s(model: Model, prompts: list[list[int]]) -> None:
    graph, signature = model.graph("classify", "bfloat16")
    assert_scores(model.session(graph), signature, model.reference, prompts)
