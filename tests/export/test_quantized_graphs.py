"""Exports of 4 and 8 bits: run on the CPU, they are models of the numbers that codes stand for.

`tests.cuda_on_cpu` says what is changed for that.
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
from scipy.special import log_softmax, logsumexp

from beam_gemma.artifact import Artifact
from export.__main__ import export
from tests.cuda_kernels import unplaced
from tests.cuda_models import Stepper, reference
from tests.cuda_on_cpu import cuda_file_on_cpu
from tests.ragged import Feeder, run_schedule, schedules
from tests.reference import logits_of, save_checkpoint

LENGTHS = [40, 17, 5]
SCHEDULES = schedules(LENGTHS)
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
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                own = Q8 if "embed_tokens" in key else kind
                rounded = dequantize(quantize(parameter.numpy(), own), own)
                assert np.abs(rounded - parameter.numpy()).max() > 1e-4
                parameter.copy_(torch.from_numpy(rounded))
    return Exported(artifact=Artifact.open(folder / "model"), reference=model)


def prompts(exported: Exported) -> list[list[int]]:
    vocab = exported.artifact.config.vocab_size
    return [np.random.default_rng(n).integers(3, vocab, n).tolist() for n in LENGTHS]


def test_logits_are_those_of_the_rounded_model(exported: Exported, tmp_path: Path) -> None:
    session = exported.session("generate", tmp_path)
    signature = exported.artifact.signature("generate", "cuda")
    sequences = prompts(exported)
    exact = [logits_of(exported.reference, ids) for ids in sequences]
    for schedule, steps in SCHEDULES.items():
        feeder = Feeder(signature, len(sequences), max(LENGTHS))
        stepper = Stepper(session, signature, feeder.state())
        ours = run_schedule(steps, sequences, feeder, lambda f, s=stepper: s.run(f)["logits"])
        for got, expected in zip(ours, exact, strict=True):
            difference = np.abs(log_softmax(got, axis=1) - log_softmax(expected, axis=1)).max()
            assert difference < 1e-4, f"{schedule}: {difference}; float32 on both sides"


def test_scores_are_those_of_the_rounded_model(exported: Exported, tmp_path: Path) -> None:
    """Its head looks targets up among the rows that it multiplies with."""
    session = exported.session("score", tmp_path)
    signature = exported.artifact.signature("score", "cuda")
    sequences = prompts(exported)
    feeder = Feeder(signature, len(sequences), max(LENGTHS))
    feeds = feeder.feeds(list(enumerate(sequences)))
    feeds["target_rows"] = np.arange(len(feeds["logit_rows"]))
    feeds["target_ids"] = np.random.default_rng(3).integers(0, 300, len(feeds["target_rows"]))
    outputs = Stepper(session, signature, feeder.state()).run(feeds)
    logits = np.concatenate([logits_of(exported.reference, ids) for ids in sequences])
    expected = logits[feeds["target_rows"], feeds["target_ids"]]
    # float32 on both sides.
    np.testing.assert_allclose(outputs["target_logits"], expected, rtol=0, atol=1e-4)
    normalizers = outputs["top_logits"] - np.log(outputs["top_probability"].astype(np.float64))
    np.testing.assert_allclose(normalizers, logsumexp(logits, axis=1), rtol=0, atol=1e-4)


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
