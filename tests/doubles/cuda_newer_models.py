"""Tiny Gemma 3n and Gemma 4 as graphs for CUDA that the CPU provider runs, beside references.

Widths are multiples of 32, which int8 and int4 take, and widths of embeddings are 64, so that their
factor is 8 in all types.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Head
from beam_gemma.model.signature import Signature
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from tests.doubles.cuda_models import Model, effective_weights
from tests.doubles.cuda_on_cpu import cuda_file_on_cpu, table_numbers
from tests.doubles.gemma3n_models import gemma3n_model
from tests.doubles.gemma4_models import GEMMA4_MODELS, gemma4_model
from tests.doubles.once import exporter_digest, kept
from tests.doubles.reference import save_checkpoint

ACROSS = 0.8943502263331446
"""The share of a normal distribution below 1.25 deviations, a number that bfloat16 holds."""
PER_LAYER = {"hidden_size_per_layer_input": 64}
OF_GEMMA3N: dict[str, Any] = {
    **PER_LAYER,
    "head_dim": 32,
    "laurel_rank": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [ACROSS, 0.0, 0.0, 0.0],
}
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4_e2b": PER_LAYER,
    "gemma4_moe": {"moe_intermediate_size": 32},
    "gemma4_wide_heads": {},
}


def newer_reference(name: str) -> torch.nn.Module:
    """Return a reference in float32 with weights that bfloat16 holds."""
    if name in GEMMA4_MODELS:
        model = gemma4_model(name, hidden_size=64, **OTHER_SETTINGS[name])
    else:
        model = gemma3n_model(name, hidden_size=64, **OF_GEMMA3N)
    with torch.no_grad():
        for tensor in (*model.parameters(), *layer_scalars(model)):
            tensor.copy_(tensor.to(torch.bfloat16))
    return model


def layer_scalars(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the factors of a Gemma 4's layers, which are no parameters."""
    return [tensor for name, tensor in model.named_buffers() if name.endswith("layer_scalar")]


@functools.cache
def newer_cuda_model(name: str) -> Model:
    """Return a tiny model, of which graphs for CUDA are traced."""
    checkpoint = read_checkpoint(_checkpoint(name))
    weights = effective_weights(checkpoint)
    return Model(name, newer_reference(name), checkpoint.config, None, weights)


def newer_export(name: str, precision: str, tasks: tuple[str, ...] = ("generate",)) -> Artifact:
    """Return the export of a tiny model for CUDA, made once for an exporter."""

    def make(folder: Path) -> None:
        export(_checkpoint(name), folder, device="cuda", precision=precision, tasks=tasks)

    of = "-".join((name, precision, *tasks))
    return Artifact.open(kept(f"newer-{of}-{exporter_digest()}", make))


def _checkpoint(name: str) -> Path:
    return kept(
        f"newer-{name}-checkpoint-{exporter_digest()}",
        lambda folder: save_checkpoint(newer_reference(name), folder),
    )


def graph_on_cpu(artifact: Artifact, head: Head) -> Path:
    """Return the file of a graph that the CPU provider runs, with its tables as weights."""
    source, signature = artifact.graph_path(head, "cuda"), artifact.signature(head, "cuda")

    def make(folder: Path) -> None:
        folder.mkdir()
        cuda_file_on_cpu(source, folder / "graph.onnx", signature.tables)

    return kept(f"{artifact.path.name}-{head}-on-cpu", make) / "graph.onnx"


def graph_with_tables(artifact: Artifact, head: Head) -> tuple[Path, Signature]:
    """Return a graph that the CPU provider runs and its signature, with tables as files beside it.

    All have float32 in place of 16 bits.
    """
    source, signature = artifact.graph_path(head, "cuda"), artifact.signature(head, "cuda")

    def make(folder: Path) -> None:
        folder.mkdir()
        cuda_file_on_cpu(source, folder / "graph.onnx")
        for i, table in enumerate(signature.tables):
            numbers = table_numbers(table, artifact.path)
            (folder / f"{i}.bin").write_bytes(widened(numbers).tobytes())

    folder = kept(f"{artifact.path.name}-{head}-with-tables-on-cpu", make)
    tables = tuple(
        replace(table, file=f"{i}.bin", offset=0, dtype=WIDENED.get(table.dtype, table.dtype))
        for i, table in enumerate(signature.tables)
    )
    return folder / "graph.onnx", replace(signature, dtype="float32", tables=tables)


WIDENED = dict.fromkeys(("bfloat16", "float16"), "float32")


def widened(numbers: np.ndarray) -> np.ndarray:
    """Return numbers in float32, unless they are codes."""
    return numbers if numbers.dtype == np.uint8 else numbers.astype(np.float32)
