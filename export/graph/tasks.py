"""The tasks of an export: those that a checkpoint supports, and the graph of each."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from beam_gemma.errors import CheckpointError, OptionsError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.signature import HEADS, Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.embedding_gemma2 import EMBEDDING_GEMMA2
from export.checkpoints.sentence_folder import MODULES
from export.checkpoints.sound_tensors import is_of_sound
from export.checkpoints.tensors import EMBEDDING, ENCODER, EOI, TABLE, Checkpoint
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.signatures import (
    LONGEST_TEXT,
    decoder_signature,
    encoder_signature,
    sound_signature,
    source_signature,
    vision_signature,
)
from export.modules.cuda_recurrent import CudaRecurrentDecoder
from export.modules.cuda_shared_cache import CudaSharedCacheDecoder
from export.modules.cuda_source_decoder import CudaSourceDecoder
from export.modules.decoder import GemmaDecoder
from export.modules.encoder import GemmaEncoder
from export.modules.encoder_decoder import SourceDecoder
from export.modules.gemma4_vision import Gemma4Vision
from export.modules.mobilenet_v5 import MobileNetVision
from export.modules.recurrent import RecurrentDecoder
from export.modules.shared_cache import SharedCacheDecoder
from export.modules.sound import SoundModel
from export.modules.source_encoder import SourceEmbedder, SourceEncoder
from export.modules.vision import VisionModel


def default_tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the tasks that are exported by default."""
    return ("generate", "classify") if checkpoint.embedding is None else ("embed",)


def check_tasks(
    config: GemmaConfig, tasks: Sequence[str], vision: VisionConfig | None = None
) -> None:
    """Check that a model supports these tasks.

    Raises:
        OptionsError: the model has bidirectional attention and a task is not `embed`, or it is a
            PaliGemma or a RecurrentGemma and a task is.
    """
    if vision is not None and vision.bidirectional == "prefix" and "embed" in tasks:
        raise OptionsError(
            "--tasks: expected generate or classify for a PaliGemma, which reads no text without "
            f"a picture, got {','.join(tasks)}"
        )
    if config.is_recurrent and "embed" in tasks:
        raise OptionsError(
            "--tasks: expected generate or classify for a RecurrentGemma, whose layers do not read "
            f"whole texts at once, got {','.join(tasks)}"
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
        OptionsError: both the checkpoint and `pooling` set the pooling, or an encoder-decoder is
            to embed with the state of the last token.
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
    if checkpoint.encoder is not None and pooling == "lasttoken":
        raise OptionsError(
            "--pooling: expected mean for a model with an encoder, whose tokens all attend to the "
            "whole text, got lasttoken"
        )
    longest = min((checkpoint.encoder or checkpoint.config).max_position_embeddings, LONGEST_TEXT)
    return EmbeddingConfig(pooling=pooling or "mean", max_tokens=longest)


def graph_signature(
    task: str,
    config: GemmaConfig,
    embedding: EmbeddingConfig | None,
    device: Device,
    dtype: str,
    vision: VisionConfig | None = None,
    sound: SoundConfig | None = None,
    encoder: GemmaConfig | None = None,
) -> Signature:
    """Return the signature of a task's graph."""
    if embedding is None or HEADS[task] != "embed":
        pictures = vision if encoder is None else None  # an encoder reads pictures, if there is one
        return decoder_signature(
            config,
            device=device,
            dtype=dtype,
            head=HEADS[task],
            vision=pictures,
            sound=sound,
            encoder=encoder,
        )
    config = encoder or config
    return encoder_signature(
        config,
        device=device,
        dtype=dtype,
        embedding_size=embedding.size(config.hidden_size),
        max_model_len=embedding.max_tokens,
        vision=vision if embeds_pictures(config) else None,
    )


def graph_signatures(
    checkpoint: Checkpoint,
    embedding: EmbeddingConfig | None,
    tasks: Sequence[str],
    device: Device,
    dtype: str,
) -> tuple[Signature, ...]:
    """Return the signatures of the tasks' graphs, of an encoder's and of towers, if any."""
    config, vision, encoder = checkpoint.config, checkpoint.vision, checkpoint.encoder
    sound = checkpoint.sound
    graphs = [
        graph_signature(t, config, embedding, device, dtype, vision, sound, encoder) for t in tasks
    ]
    if encoder is not None and set(tasks) != {"embed"}:
        graphs.append(source_signature(encoder, device=device, dtype=dtype, vision=vision))
    if vision is not None:
        graphs.append(vision_signature(config, vision, device=device, dtype=dtype))
    if sound is not None:
        graphs.append(sound_signature(config, sound, device=device, dtype=dtype))
    return tuple(graphs)


def embeds_pictures(config: GemmaConfig) -> bool:
    """Return whether a model was trained to embed pictures; others embed texts alone."""
    return config.model_type == EMBEDDING_GEMMA2


def for_embeddings(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without what no embedding needs: towers, and the decoder of a source.

    A model that embeds pictures keeps its tower.
    """
    if embeds_pictures(checkpoint.config):
        return checkpoint
    of_towers = (is_of_pictures, is_of_sound)
    kept = checkpoint.tensors.items()
    tensors = {n: t for n, t in kept if not any(is_part(n) for is_part in of_towers)}
    if checkpoint.encoder is not None:
        shared = [name for name in (EMBEDDING, EOI) if ENCODER + name not in tensors]
        tensors = {n: t for n, t in tensors.items() if n.startswith(ENCODER) or n in shared}
    return replace(checkpoint, tensors=tensors, vision=None, sound=None)


def table_dtype(checkpoint: Checkpoint, signature: Signature) -> str:
    """Return the dtype in which a graph has the table of per-layer embeddings.

    On the CPU it is the checkpoint's, so that the table is linked: a step reads few of its rows.
    """
    table = checkpoint.tensors.get(TABLE)
    if table is None or table.raw is None or signature.device == "cuda":
        return signature.dtype
    return table.dtype


def graph_module(
    config: GemmaConfig,
    embedding: EmbeddingConfig | None,
    signature: Signature,
    vision: VisionConfig | None = None,
    sound: SoundConfig | None = None,
    encoder: GemmaConfig | None = None,
) -> torch.nn.Module:
    """Return the PyTorch module that a signature describes."""
    if (tower := _tower(signature, vision, sound)) is not None:
        return tower
    if encoder is not None and signature.head == "encode":
        return SourceEncoder(encoder, signature)
    if encoder is not None and embedding is not None and signature.head == "embed":
        return SourceEmbedder(encoder, signature, embedding)
    if encoder is not None and signature.device == "cuda":
        return CudaSourceDecoder(config, signature)
    if encoder is not None:
        return SourceDecoder(config, signature)
    if config.is_recurrent and signature.device == "cuda":
        return CudaRecurrentDecoder(config, signature)
    if config.is_recurrent:
        return RecurrentDecoder(config, signature)
    if embedding is not None and signature.head == "embed":
        return GemmaEncoder(config, signature, embedding)
    if config.num_kv_shared_layers and signature.device == "cuda":
        return CudaSharedCacheDecoder(config, signature, vision)
    kind = SharedCacheDecoder if config.num_kv_shared_layers else GemmaDecoder
    return kind(config, signature, vision)


def _tower(
    signature: Signature, vision: VisionConfig | None, sound: SoundConfig | None
) -> torch.nn.Module | None:
    """Return the module of pictures or of sound, if a signature describes one."""
    if vision is not None and signature.head == "vision":
        if vision.image_step:
            return Gemma4Vision(vision, signature)
        kind = MobileNetVision if vision.projector == "mobilenet" else VisionModel
        return kind(vision, signature)
    if sound is not None and signature.head == "sound":
        return SoundModel(sound, signature)
    return None
