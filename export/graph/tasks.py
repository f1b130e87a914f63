"""The tasks of an export: those that a checkpoint supports, and the graph of each."""

from collections.abc import Sequence

import torch

from beam_gemma.errors import CheckpointError, OptionsError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import HEADS, Signature
from export.checkpoints.sentence_folder import MODULES
from export.checkpoints.tensors import Checkpoint
from export.graph.signatures import decoder_signature, encoder_signature
from export.modules.decoder import GemmaDecoder
from export.modules.encoder import GemmaEncoder

LONGEST_TEXT = 8192
"""Longest text that a decoder embeds, in tokens, unless the model's limit is lower. The memory for
full attention scores grows quadratically and is 1 GB at this length for a 270M model."""


def default_tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the tasks that are exported by default."""
    return ("generate", "classify") if checkpoint.embedding is None else ("embed",)


def check_tasks(config: GemmaConfig, tasks: Sequence[str]) -> None:
    """Check that a model supports these tasks.

    Raises:
        OptionsError: the model has bidirectional attention and a task is not `embed`.
    """
    if config.use_bidirectional_attention and set(tasks) != {"embed"}:
        raise OptionsError(
            f"--tasks: expected embed alone for a model with two-sided attention, got "
            f"{','.join(tasks)}"
        )


def embedding_config(checkpoint: Checkpoint, pooling: Pooling | None) -> EmbeddingConfig:
    """Return the embedding settings of a checkpoint.

    Raises:
        CheckpointError: a model with bidirectional attention has no `modules.json`.
        OptionsError: both the checkpoint and `pooling` set the pooling.
    """
    if checkpoint.embedding is not None:
        if pooling is not None:
            raise OptionsError(
                f"--pooling: expected none, since the checkpoint's {MODULES} settles it, "
                f"got {pooling}"
            )
        return checkpoint.embedding
    if checkpoint.config.use_bidirectional_attention:
        raise CheckpointError(
            f"{checkpoint.path}: expected {MODULES} beside a model with two-sided attention, got "
            "none; take the whole folder as it is published"
        )
    longest = min(checkpoint.config.max_position_embeddings, LONGEST_TEXT)
    return EmbeddingConfig(pooling=pooling or "mean", max_tokens=longest)


def graph_signature(
    task: str,
    config: GemmaConfig,
    embedding: EmbeddingConfig | None,
    device: Device,
    dtype: str,
) -> Signature:
    """Return the signature of a task's graph."""
    if embedding is None or HEADS[task] != "embed":
        return decoder_signature(config, device=device, dtype=dtype, head=HEADS[task])
    return encoder_signature(
        config,
        device=device,
        dtype=dtype,
        embedding_size=embedding.size(config.hidden_size),
        max_model_len=embedding.max_tokens,
    )


def graph_module(
    config: GemmaConfig, embedding: EmbeddingConfig | None, signature: Signature
) -> torch.nn.Module:
    """Return the PyTorch module that a signature describes."""
    if embedding is None or signature.head != "embed":
        return GemmaDecoder(config, signature)
    return GemmaEncoder(config, signature, embedding)
