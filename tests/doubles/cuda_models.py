"""Tiny models as graphs for CUDA that the CPU provider runs, beside their references.

Small vocabularies never reach the second level of the choice among logits, so one model has more
columns than that takes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers
from scipy.special import log_softmax, logsumexp

from beam_gemma.engine.embedding_engine import feeds as packed
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import Signature
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.runtime.step_shapes import side_by_side
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint, is_norm
from export.graph.tasks import graph_module, graph_signature
from export.graph.weights import inverse_frequencies
from tests.doubles.cuda_on_cpu import cuda_on_cpu
from tests.doubles.once import exporter_digest, kept
from tests.doubles.ragged import Feeder, Feeds, run_schedule, schedules
from tests.doubles.reference import (
    CLASSES,
    FULL,
    MODELS,
    SHAPE,
    SLIDING,
    draw_weights,
    logits_of,
    save_checkpoint,
)
from tests.doubles.traces import kept_trace, with_weights_as_inputs

EAGER = {"attn_implementation": "eager"}
LAYERS = {
    "gemma": [FULL],
    "gemma_mha": [FULL],
    "gemma2": [SLIDING, FULL],
    "vaultgemma": [FULL],
    "gemma3_text": [SLIDING, FULL],
}
"""Of each model: one of each type is enough for its graph, and soon traced."""
WIDE_VOCAB = {"gemma2": 8192}
DTYPES = ("bfloat16", "float16")
TWO_SIDED = "embeddinggemma"
EMBEDDINGS = {
    TWO_SIDED: EmbeddingConfig(pooling="mean", dense_sizes=(96, 160), max_tokens=512),
    "gemma2": EmbeddingConfig(pooling="mean", max_tokens=512),
    "gemma3_text": EmbeddingConfig(pooling="lasttoken", max_tokens=512),
}
"""How some models embed."""


def reference(name: str) -> torch.nn.Module:
    """Return a model of `tests.doubles.reference`, with fewer layers and 64 channels.

    The factor of its embeddings is then 8, which is the same in every dtype.
    """
    if name == TWO_SIDED:
        shape = {**SHAPE, **MODELS["gemma3_text"], "hidden_size": 64, "num_hidden_layers": 2}
        shape |= {"layer_types": [SLIDING, FULL], "use_bidirectional_attention": True}
        config = transformers.Gemma3TextConfig(**shape)
        return draw_weights(transformers.Gemma3TextModel._from_config(config, **EAGER))
    config_class, model_class = CLASSES[name.removesuffix("_mha")]
    shape = {**SHAPE, **MODELS[name], "hidden_size": 64}
    shape |= {"num_hidden_layers": len(LAYERS[name])}
    shape["vocab_size"] = WIDE_VOCAB.get(name, shape["vocab_size"])
    if "layer_types" in shape:
        shape["layer_types"] = LAYERS[name]
    config = config_class(**shape)
    return draw_weights(model_class._from_config(config, **EAGER))


@dataclasses.dataclass(frozen=True)
class Model:
    """A reference, and what its graphs are made of."""

    name: str
    reference: torch.nn.Module
    config: GemmaConfig
    embedding: EmbeddingConfig | None
    weights: Mapping[str, np.ndarray]
    vision: VisionConfig | None = None
    """The tower of a model whose texts have pictures."""

    def graph(self, task: str, dtype: str) -> tuple[ir.Model, Signature]:
        """Return a graph for CUDA without its weights, and its signature.

        A graph is traced once in a run; each call returns another copy.
        """
        signature = graph_signature(task, self.config, self.embedding, "cuda", dtype, self.vision)
        build = partial(graph_module, self.config, self.embedding, signature)
        return kept_trace(build, signature), signature

    def on_cpu(self, graph: ir.Model) -> bytes:
        """Change a graph for the CPU, and give it float32 weights."""
        cuda_on_cpu(graph)
        for name, value in graph.graph.initializers.items():
            if value.const_value is None:
                value.const_value = ir.tensor(self.weights[name], name=name)
        return ir.to_proto(graph).SerializeToString()

    def session(self, graph: ir.Model) -> onnxruntime.InferenceSession:
        """Load a graph, changed for the CPU."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            self.on_cpu(graph), options, providers=["CPUExecutionProvider"]
        )


def rounded_reference(name: str) -> torch.nn.Module:
    """Return a reference in float32 with weights that bfloat16 holds; rotations stay exact."""
    model = reference(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def exported(name: str, device: Device, precision: str, tasks: Sequence[str]) -> Artifact:
    """Return the export of a rounded reference, made once in a run."""

    def make(folder: Path) -> None:
        checkpoint = save_checkpoint(rounded_reference(name), folder / "checkpoint")
        export(checkpoint, folder / "model", device=device, precision=precision, tasks=tasks)

    of = "-".join((name, device, precision, *tasks))
    return Artifact.open(kept(f"few-layers-{of}-{exporter_digest()}", make) / "model")


@functools.cache
def cuda_model(name: str, folder: Path) -> Model:
    """Return one of `LAYERS`, or the two-sided one, with weights that bfloat16 holds."""
    model = rounded_reference(name)
    checkpoint = read_checkpoint(save_checkpoint(model, folder / name))
    weights = effective_weights(checkpoint)
    embedding = EMBEDDINGS.get(name)
    widths = (64, *embedding.dense_sizes) if embedding else ()
    for i, (rows, columns) in enumerate(itertools.pairwise(widths)):
        noise = np.random.default_rng(i).standard_normal((columns, rows))
        weights[f"dense.{i}.weight"] = noise.astype(np.float32)
    return Model(name, model, checkpoint.config, embedding, weights)


def effective_weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint's decoder in float32, by their names in a graph."""
    weights = {
        key: np.concatenate([np.asarray(c, np.float32) for c in stored.chunks()])
        + np.float32(checkpoint.norm_offset if is_norm(key) else 0)
        for key, stored in checkpoint.tensors.items()
    }
    for group in checkpoint.config.groups:
        weights[f"rotary.{group}.inv_freq"] = inverse_frequencies(checkpoint.config, group)
    return weights


def checked(graph: ir.Model) -> onnx.ModelProto:
    """Run ONNX's own checks on a graph for CUDA; its weights count as inputs."""
    proto = with_weights_as_inputs(graph)
    onnx.checker.check_model(proto)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


class Stepper:
    """Runs the steps of a changed graph, and keeps its state between them."""

    def __init__(
        self, session: onnxruntime.InferenceSession, signature: Signature, state: Feeds
    ) -> None:
        self._session = session
        self._signature = signature
        self.state = state

    def run(self, feeds: Feeds) -> Feeds:
        """Return the outputs of a step by name."""
        names = [output.name for output in self._session.get_outputs()]
        arrays = self._session.run(names, {**feeds, **self.state})
        outputs = dict(zip(names, arrays, strict=True))
        self.state = {
            t.input_name: outputs.pop(t.output_name) for t in self._signature.state_tensors()
        }
        return outputs


def assert_logits(
    session: onnxruntime.InferenceSession,
    signature: Signature,
    model: torch.nn.Module,
    prompts: list[list[int]],
) -> None:
    """Compare a changed graph's logits with a reference's, however tokens come in steps."""
    lengths = [len(ids) for ids in prompts]
    exact = [logits_of(model, ids) for ids in prompts]
    for schedule, steps in schedules(lengths).items():
        feeder = Feeder(signature, len(prompts), max(lengths))
        stepper = Stepper(session, signature, feeder.state())
        ours = run_schedule(steps, prompts, feeder, lambda f, s=stepper: s.run(f)["logits"])
        for got, expected in zip(ours, exact, strict=True):
            difference = np.abs(log_softmax(got, axis=1) - log_softmax(expected, axis=1)).max()
            assert difference < 1e-4, f"{schedule}: {difference}; float32 on both sides"


def assert_scores(
    session: onnxruntime.InferenceSession,
    signature: Signature,
    model: torch.nn.Module,
    prompts: list[list[int]],
) -> None:
    """Compare what a changed graph says of three targets at each token with a reference."""
    feeder = Feeder(signature, len(prompts), max(len(ids) for ids in prompts))
    feeds = feeder.feeds(list(enumerate(prompts)))
    num_rows = len(feeds["logit_rows"])
    feeds["target_rows"] = np.repeat(np.arange(num_rows), 3)
    feeds["target_ids"] = np.random.default_rng(3).integers(0, signature.vocab_size, 3 * num_rows)
    outputs = Stepper(session, signature, feeder.state()).run(feeds)
    logits = np.concatenate([logits_of(model, ids) for ids in prompts])
    expected = logits[feeds["target_rows"], feeds["target_ids"]]
    # float32 on both sides.
    np.testing.assert_allclose(outputs["target_logits"], expected, rtol=0, atol=1e-4)
    normalizers = outputs["top_logits"] - np.log(outputs["top_probability"].astype(np.float64))
    np.testing.assert_allclose(normalizers, logsumexp(logits, axis=1), rtol=0, atol=1e-4)


def assert_embeddings(
    session: onnxruntime.InferenceSession,
    signature: Signature,
    model: torch.nn.Module,
    texts: list[list[int]],
    *,
    pooling: str,
    dense: Iterable[np.ndarray] = (),
) -> None:
    """Compare a changed graph's embeddings with what is made of a reference's states."""
    outputs = Stepper(session, signature, {}).run(side_by_side(packed(texts)))
    layers = getattr(model, "model", model)
    for row, ids in enumerate(texts):
        with torch.no_grad():
            states = layers(torch.tensor([ids])).last_hidden_state[0].numpy()
        vector = states[-1] if pooling == "lasttoken" else states.mean(axis=0)
        for matrix in dense:
            vector = matrix @ vector
        # float32 on both sides; embeddings have length 1, states are of order 1.
        unit = vector / np.linalg.norm(vector)
        np.testing.assert_allclose(outputs["embedding"][row], unit, rtol=0, atol=2e-6)
        np.testing.assert_allclose(outputs["first_state"][row], states[0], rtol=0, atol=2e-5)
