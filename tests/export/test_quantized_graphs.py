"""Exports of 4 and 8 bits: run on the CPU, they are models of the numbers that codes stand for.

`tests.doubles.cuda_on_cpu` says what is changed for that.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from beam_gemma.model.artifact import Artifact
from export.__main__ import export
from tests.doubles.cuda_kernels import unplaced
from tests.doubles.cuda_models import assert_embeddings, assert_logits, assert_scores, reference
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu
from tests.doubles.reference import FULL, SLIDING, save_checkpoint
from tests.doubles.sentence_model import sentence_model

LENGTHS = [40, 17, 5]
Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
CASES = {"int8": ("gemma2", Q8), "int4": ("gemma3_text", Q4)}
"""A model for each precision, and what its matrices are rounded to; the embedding is Q8_0."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder, and the reference with the numbers that it should have."""

    artifact: Artifact
    reference: torch.nn.Module

    def session(self, task: str, folder: Path) -> onnxruntime.InferenceSession:
        source = self.artifact.graph_path(task, "cuda")
        file = cuda_file_on_cpu(source, folder / f"{task}.onnx")
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, kind = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = reference(name)
    source = save_checkpoint(model, folder / "checkpoint")
    export(source, folder / "model", device="cuda", precision=request.param)
    round_matrices(model, kind)
    return Exported(artifact=Artifact.open(folder / "model"), reference=model)


def round_matrices(model: torch.nn.Module, kind: GGMLQuantizationType) -> None:
    """Have a model the numbers that codes stand for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                own = Q8 if "embed_tokens" in name else kind
                rounded = dequantize(quantize(parameter.numpy(), own), own)
                assert np.abs(rounded - parameter.numpy()).max() > 1e-4
                parameter.copy_(torch.from_numpy(rounded))


def prompts(exported: Exported) -> list[list[int]]:
    vocab = exported.artifact.config.vocab_size
    return [np.random.default_rng(n).integers(3, vocab, n).tolist() for n in LENGTHS]


def test_logits_are_those_of_the_rounded_model(exported: Exported, tmp_path: Path) -> None:
    session = exported.session("generate", tmp_path)
    signature = exported.artifact.signature("generate", "cuda")
    assert_logits(session, signature, exported.reference, prompts(exported))


def test_scores_are_those_of_the_rounded_model(exported: Exported, tmp_path: Path) -> None:
    """Its head looks targets up among the rows that it multiplies with."""
    session = exported.session("score", tmp_path)
    signature = exported.artifact.signature("score", "cuda")
    assert_scores(session, signature, exported.reference, prompts(exported))


@pytest.mark.parametrize(("precision", "kind"), [("int8", Q8), ("int4", Q4)])
def test_embeddings_are_those_of_the_rounded_model(
    precision: str, kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    """Two-sided, with dense layers, which are in blocks too."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    model = sentence_model(tmp_path / "checkpoint", **size)
    export(tmp_path / "checkpoint", tmp_path / "model", device="cuda", precision=precision)
    round_matrices(model, kind)
    exported = Exported(artifact=Artifact.open(tmp_path / "model"), reference=model[0].model)
    assert_embeddings(
        exported.session("embed", tmp_path),
        exported.artifact.signature("embed", "cuda"),
        exported.reference,
        prompts(exported),
        pooling="mean",
        dense=[model[i].linear.weight.detach().numpy() for i in (2, 3)],
    )
    graph = onnx.load(exported.artifact.graph_path("embed", "cuda"), load_external_data=False)
    assert unplaced(graph) == []


@pytest.mark.parametrize("head", ["generate", "score"])
def test_each_node_has_a_kernel_for_cuda(exported: Exported, head: str) -> None:
    path = exported.artifact.graph_path(head, "cuda")
    assert unplaced(onnx.load(path, load_external_data=False)) == []


def test_matrices_are_there_once_and_in_blocks_alone(exported: Exported) -> None:
    """For both graphs; what is not in blocks has one dimension."""
    weights = exported.artifact.path / "weights"
    assert [file.name for file in weights.iterdir()] == ["written.safetensors"]
    with safe_open(weights / "written.safetensors", "np") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    bits = {"int8": 8, "int4": 4}[exported.artifact.precision]
    matrices = {n.partition(":")[0]: p for n, p in exported.reference.named_parameters()}
    stored = {
        name.removeprefix("model."): tuple(parameter.shape)
        for name, parameter in matrices.items()
        if parameter.ndim == 2
    }
    for name, (outputs, inputs) in stored.items():
        own = 8 if "embed_tokens" in name else bits
        assert shapes.pop(f"{name}:{own}:codes") == (outputs, inputs // 32, 4 * own)
        assert shapes.pop(f"{name}:{own}:scales") == (outputs, inputs // 32)
    assert all(len(shape) == 1 for shape in shapes.values())
