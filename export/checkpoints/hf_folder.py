"""Reads a checkpoint: its architecture, and its tensors named as in `export.modules.decoder`.

A checkpoint is a Hugging Face folder with safetensors files, sharded or not, one GGUF file, or one
file of gemma_pytorch.
"""

import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, ConfigError, nearest
from beam_gemma.model.config import IGNORED_KEYS, GemmaConfig
from export.checkpoints.ckpt_file import read_ckpt
from export.checkpoints.gguf_file import read_gguf
from export.checkpoints.sentence_folder import MODULES, read_sentence_folder
from export.checkpoints.sidecar_files import (
    chat_template,
    eos_token_ids,
    legal_files,
    read_json,
    tokenizer_bytes,
)
from export.checkpoints.tensors import Checkpoint, RawBytes, StoredTensor, raw_tensor

LOGGER = logging.getLogger("export")
DECODER_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
"""Prefixes of a decoder's tensor names: old and new Gemma 3 with images, and text models."""
IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.")
"""Prefixes of image tensors in Gemma 3, which a text model leaves out; `model.` may precede."""
IMAGE_KEYS = frozenset({
    "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id",
    "image_token_index", "mm_tokens_per_image", "text_config", "tie_word_embeddings",
    "vision_config",
})  # fmt: skip
"""Keys beside `text_config` in the config.json of a Gemma 3 with images."""
TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""Values that published config.json files of Gemma 3 4B to 27B omit: transformers' defaults."""
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or a file of gemma_pytorch.

    Raises:
        CheckpointError: the path holds none of them, or tensors are missing or left over.
        ConfigError: the architecture is not supported.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(path)
    if path.suffix == ".ckpt" and path.is_file():
        return read_ckpt(path)
    raise CheckpointError(
        f"{path}: expected a folder with config.json and safetensors files, or a .gguf or .ckpt "
        f"file, got {'another file' if path.exists() else 'nothing'}"
    )


def check_names(found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint has exactly the expected tensors and shapes.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    for name in sorted(set(expected) - set(found)):
        raise CheckpointError(
            f"checkpoint: expected the tensor {name}, got none{nearest(name, found)}"
        )
    for name in sorted(set(found) - set(expected)):
        raise CheckpointError(
            f"checkpoint: the tensor {found[name].name} has no place in this architecture"
            f"{nearest(name, expected)}"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"checkpoint: expected {found[name].name} of shape {list(shape)} as config.json "
                f"says, got {list(found[name].shape)}"
            )


def _read_folder(folder: Path) -> Checkpoint:
    raw = read_json(folder / "config.json")
    has_images = raw.get("model_type") == "gemma3"
    config = GemmaConfig.from_hf(_text_config(raw) if has_images else raw)
    tensors = {}
    for file in _safetensors_files(folder):
        for stored in read_safetensors(file):
            name = _decoder_name(stored.name, config, has_images=has_images)
            if name is not None:
                tensors[name] = stored
    embedding = None
    if (folder / MODULES).exists():
        embedding, dense_folders = read_sentence_folder(folder, config)
        for i, dense in enumerate(dense_folders):
            for stored in read_safetensors(dense / "model.safetensors"):
                tensors[f"dense.{i}.{stored.name.removeprefix('linear.')}"] = stored
    if has_images:
        LOGGER.warning("%s: exporting the text model; what it has for images is left out", folder)
    return Checkpoint(
        name=folder.name,
        path=folder,
        format="safetensors",
        config=config,
        tensors=tensors,
        norm_offset=1.0,
        tokenizer_model=lambda: tokenizer_bytes(folder),
        eos_token_ids=eos_token_ids(folder, raw),
        chat_template=chat_template(folder),
        legal_files=legal_files(folder),
        embedding=embedding,
    )


def _text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config of a Gemma 3 with images; check the keys beside it."""
    known = IMAGE_KEYS | IGNORED_KEYS
    for key in sorted(set(raw) - known):
        raise ConfigError(f"config.json: the key {key!r} is not known{nearest(key, known)}")
    return {**TEXT_DEFAULTS, **raw.get("text_config", {})}


def _decoder_name(name: str, config: GemmaConfig, *, has_images: bool) -> str | None:
    """Return our name of a Hugging Face tensor, or None if a text model does not need it."""
    if name.removeprefix("language_model.") == "lm_head.weight":
        return None  # the head is the embedding
    if has_images and name.removeprefix("model.").startswith(IMAGE_PREFIXES):
        return None
    prefixes = DECODER_PREFIXES if has_images else DECODER_PREFIXES[-1:]
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    if config.model_type == "vaultgemma":  # Gemma 1's block under the names of later ones
        name = name.replace("pre_feedforward_layernorm", "post_attention_layernorm")
    return name.removeprefix(prefix)


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the shards that the index names, or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected a safetensors file, got nothing")
    return [folder / name for name in names]


def read_safetensors(file: Path) -> Iterator[StoredTensor]:
    """Describe the tensors of one safetensors file from its header alone."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            raise CheckpointError(f"{file}: expected a safetensors header, got another file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{file}: expected {name} as one of {', '.join(SAFETENSORS_DTYPES)}, "
                f"got {entry['dtype']}"
            )
        start, end = entry["data_offsets"]
        raw = RawBytes(file=file, offset=8 + length + start, length=end - start)
        if raw.offset + raw.length > file.stat().st_size:
            raise CheckpointError(f"{file}: the file ends inside the tensor {name}; copy it again")
        yield raw_tensor(name, tuple(entry["shape"]), dtype, raw)
