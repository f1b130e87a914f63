"""The tasks of an export: those that a checkpoint supports, and the graph of each."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from beam_gemma.errors import CheckpointError, OptionsError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import HEADS, Signature
from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.sentence_folder import MODULES
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.signatures import decoder_signature, encoder_signature, vision_signature
from export.modules.decoder import GemmaDecoder
from export.modules.encoder import GemmaEncoder
from export.modules.vision import VisionModel

LONGEST_TEXT = 8192
"""Longest text that a decoder embeds, in tokens, unless the model's limit is lower. The memory for
full attention scores grows quadratically and is 1 GB at this length for a 270M model."""


def default_tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the tasks that are exported by default."""
    return ("generate", "classify") if checkpoint.embedding is None else ("embed",)


def check_tasks(
    config: GemmaConfig, tasks: Sequence[str], vision: VisionConfig | None = None
) -> None:
    """Check that a model supports these tasks.

    Raises:
        OptionsError: the model has bidirectional attention and a task is not `embed`, or it is a
            PaliGemma and a task is.
    """
    if vision is not None and vision.bidirectional == "prefix" and "embed" in tasks:
        raise OptionsError(
            "--tasks: expected generate or classify for a PaliGemma, which reads no text without "
            f"a picture, got {','.join(tasks)}"
        )
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
    vision: VisionConfig | None = None,
) -> Signature:
    """Return the signature of a task's graph."""
    if embedding is None or HEADS[task] != "embed":
        return decoder_signature(
            config, device=device, dtype=dtype, head=HEADS[task], vision=vision
        )
    return encoder_signature(
        config,
        device=device,
        dtype=dtype,
        embedding_size=embedding.size(config.hidden_size),
        max_model_len=embedding.max_tokens,
    )


def graph_signatures(
    checkpoint: Checkpoint,
    embedding: EmbeddingConfig | None,
    tasks: Sequence[str],
    device: Device,
    dtype: str,
) -> tuple[Signature, ...]:
    """Return the signature of each task's graph, and of the tower's if there is one."""
    config, vision = checkpoint.config, checkpoint.vision
    graphs = tuple(graph_signature(t, config, embedding, device, dtype, vision) for t in tasks)
    if vision is None:
        return graphs
    return (*graphs, vision_signature(config, vision, device=device, dtype=dtype))


def without_pictures(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without what it has for pictures, which no embedding needs."""
    text = {n: t for n, t in checkpoint.tensors.items() if not is_of_pictures(n)}
    return replace(checkpoint, tensors=text, vision=None)


def graph_module(
    config: GemmaConfig,
    embedding: EmbeddingConfig | None,
    signature: Signature,
    vision: VisionConfig | None = None,
) -> torch.nn.Module:
    """Return the PyTorch module that a signature describes."""
    if vision is not None and signature.head == "vision":
        return VisionModel(vision, signature)
    if embedding is None or signature.head != "embed":
        return GemmaDecoder(config, signature, vision)
    return GemmaEncoder(config, signature, embedding)
