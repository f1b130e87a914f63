"""Checkpoints in each format that is read, written by the libraries that define the formats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import torch

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.layer_types import FULL
from export.checkpoints.gguf_config import MODEL_TYPES
from export.checkpoints.gguf_keys import EMBEDDER
from export.checkpoints.gguf_names import LAYER_NAMES, NORM_NAMES
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.released_sizes import tensor_shapes
from export.checkpoints.tensors import Checkpoint, StoredTensor
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

ARCHITECTURES = {
    model_type: arch
    for arch, model_type in MODEL_TYPES.items()
    if model_type in NORM_NAMES and arch != EMBEDDER
}
"""Name in GGUF of each model type that `write_gguf` writes."""
TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "dense.0": "dense_2",
             "dense.1": "dense_3"}  # fmt: skip
MINI: dict[str, Any] = {
    "model_type": "gemma", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "eos_token_id": [1, 5],
}  # fmt: skip
"""The config.json of a model that is read in a millisecond."""


def values(stored: StoredTensor) -> np.ndarray:
    """Return all numbers of a tensor."""
    return np.concatenate(list(stored.chunks()))


def write_mini(folder: Path) -> Checkpoint:
    """Write a folder of `MINI` with random weights, and open it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MINI))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    rng = np.random.default_rng(0)
    tensors = {
        f"model.{name}": rng.standard_normal(shape, np.float32).astype(np.float16)
        for name, shape in tensor_shapes(GemmaConfig.from_hf(MINI)).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return read_checkpoint(folder)


def shard(folder: Path, num_shards: int) -> None:
    """Split a folder's safetensors file as large models are."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(num_shards):
        part = dict(list(tensors.items())[i::num_shards])
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        safetensors.numpy.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    *,
    skip: str = "",
    rename: str = "",
    vocabulary: tuple[list[str], list[float], list[int]] | None = None,
    packed: str = "",
    settings: Mapping[str, Any] | None = None,
    head: np.ndarray | None = None,
    part_tensors: int = 0,
) -> Path:
    """Write a checkpoint as llama.cpp's converter does: norms as 1 + w, matrices as F16 or F32.

    One with dense layers is an EmbeddingGemma there.

    Args:
        path: To write.
        checkpoint: To read.
        skip: Name of a tensor to leave out.
        rename: Name of a tensor to give a name that no Gemma has.
        vocabulary: Pieces, scores and types.
        packed: Name of a tensor to write as Q8_0.
        settings: More metadata by key.
        head: Weight of a head of its own.
        part_tensors: Tensors in each of several files, whose names have a number before `.gguf`.
    """
    config = checkpoint.config
    arch = ARCHITECTURES[config.model_type] if checkpoint.embedding is None else EMBEDDER
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part_tensors)
    _add_settings(writer, config)
    if checkpoint.embedding is not None:
        _add_embedding(writer, checkpoint.embedding, config.hidden_size)
    for key, value in (settings or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if head is not None:
        writer.add_tensor("output.weight", head)
    if vocabulary is not None:
        writer.add_token_list(vocabulary[0])
        writer.add_token_scores(vocabulary[1])
        writer.add_token_types(vocabulary[2])
    theirs = {o: t for t, o in (LAYER_NAMES | NORM_NAMES[config.model_type]).items()}
    for name, stored in checkpoint.tensors.items():
        if name == skip:
            continue
        stem = name.removesuffix(".weight")
        stem = TOP_NAMES.get(stem, stem)
        if stem.startswith("layers."):
            _, index, part = stem.split(".", 2)
            stem = f"blk.{index}.{theirs[part]}"
        stem = "blk.0.odd" if name == rename else stem
        array = values(stored) + 1 if name.endswith("norm.weight") else values(stored)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == packed else None
        if kind is not None:
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{stem}.weight", array, raw_dtype=kind)
    finish(writer)
    return path


def _add_settings(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope(FULL).rope_theta)
    writer.add_rope_scaling_factor(config.rope(FULL).factor)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping and config.final_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_embedding(writer: gguf.GGUFWriter, embedding: EmbeddingConfig, width: int) -> None:
    pooling = {"mean": gguf.PoolingType.MEAN, "lasttoken": gguf.PoolingType.LAST}
    writer.add_pooling_type(pooling[embedding.pooling])
    for name, size in zip(("dense_2", "dense_3"), embedding.dense_sizes, strict=True):
        writer.add_dense_features_dims(name, width, size)
        width = size
    writer.add_add_bos_token(embedding.add_bos)
    writer.add_add_eos_token(embedding.add_eos)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what was added to a GGUF file, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_numbers(path: Path) -> list[tuple[int, int]]:
    """Return place and width of each number in a GGUF header: counts, lengths, types, offsets."""
    reader = gguf.GGUFReader(path)
    places = [(4, 4), (8, 8), (16, 8)]
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    for field in [*fields, *(tensor.field for tensor in reader.tensors)]:
        place = field.offset
        # A vocabulary has hundreds of parts, all alike.
        for part in field.parts[:20]:
            if part.dtype != np.uint8:
                width = part.dtype.itemsize
                places += [(place + i * width, width) for i in range(len(part))]
            place += int(part.nbytes)
    return places


def state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights as gemma_pytorch saves them, rotary tables included."""
    ours = {n: torch.from_numpy(values(t)) for n, t in checkpoint.tensors.items()}
    state = {"embedder.weight": ours.pop("embed_tokens.weight"), "freqs_cis": torch.ones(2, 2) + 0j}
    for i in range(checkpoint.config.num_hidden_layers):
        prefix = f"layers.{i}.self_attn."
        fused = [ours.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        ours[f"{prefix}qkv_proj.weight"] = torch.cat(fused)
    for name, tensor in ours.items():
        theirs = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
        state[f"model.{theirs}"] = tensor
    return state


def write_ckpt(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write a state as gemma_pytorch does, with the tiny tokenizer beside it."""
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    torch.save({"model_state_dict": state}, folder / "tiny.ckpt")
    return folder / "tiny.ckpt"
