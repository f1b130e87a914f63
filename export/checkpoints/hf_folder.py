"""Reads a checkpoint: its architecture, and its tensors named as in `export.modules.decoder`.

A checkpoint is a Hugging Face folder with safetensors files, sharded or not, one GGUF file, or one
file of gemma_pytorch.
"""

import logging
import re
import reprlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config import ENCODER_DECODERS, NEWER, GemmaConfig
from beam_gemma.model.encoder_decoder_config import encoder_decoder_configs
from beam_gemma.model.newer_config import is_newer
from beam_gemma.model.recurrent_config import RECURRENT_TYPE, recurrent_config
from beam_gemma.model.vision_config import VISION_MODEL_TYPES
from export.checkpoints.bounds import (
    MAX_FILE_BYTES,
    Span,
    check_count,
    check_length,
    check_name,
    check_shape,
    check_spans,
    file_bytes,
    inside,
    is_file,
)
from export.checkpoints.ckpt_file import read_ckpt
from export.checkpoints.embedding_gemma2 import EMBEDDING_GEMMA2, PROJECTION
from export.checkpoints.encoder_decoder_folder import (
    check_start,
    read_pictures,
    stack_name,
    without_copies,
)
from export.checkpoints.gguf_file import read_gguf
from export.checkpoints.newer_folder import newer_name, read_newer_config, read_newer_towers
from export.checkpoints.recurrent_file import check_no_flax, read_recurrent
from export.checkpoints.released_sizes import encoder_shapes, tensor_shapes
from export.checkpoints.sentence_folder import MODULES, read_sentence_folder
from export.checkpoints.sidecar_files import (
    are_texts,
    chat_template,
    eos_token_ids,
    json_object,
    legal_files,
    read_json,
    stated_license,
    suppress_tokens,
    tokenizer_bytes,
)
from export.checkpoints.sound_folder import check_sound_markers
from export.checkpoints.sound_tensors import is_of_sound, sound_shapes
from export.checkpoints.tensors import (
    HEAD,
    NUMPY_DTYPES,
    Checkpoint,
    RawBytes,
    StoredTensor,
    by_name,
    raw_tensor,
    without_head,
)
from export.checkpoints.vision_folder import (
    check_markers,
    check_text_only,
    read_vision,
    text_config,
)
from export.checkpoints.vision_tensors import (
    is_of_pictures,
    vision_name,
    vision_shapes,
    with_flat_kernels,
)

LOGGER = logging.getLogger("export")
MODEL_PREFIX = re.compile(r"(model\.)*")
"""What may precede the names of a model with pictures: ShieldGemma 2 has it twice."""
INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_checkpoint(path: Path, *, text_only: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file, or a file of gemma_pytorch or recurrentgemma.

    Args:
        path: The folder or file.
        text_only: Whether to leave out what a model has for pictures and sound.

    Raises:
        CheckpointError: the path holds none of them, or tensors are missing or left over.
        ConfigError: the architecture is not supported.
    """
    if path.is_dir():
        check_no_flax(path)
        return _read_folder(path, text_only=text_only)
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(path)
    if path.suffix == ".ckpt" and path.is_file():
        return read_ckpt(path, text_only=text_only)
    if path.suffix == ".pt" and path.is_file():
        return read_recurrent(path)
    raise CheckpointError(
        f"{path}: expected a folder with config.json and safetensors files, or a .gguf, .ckpt or "
        f".pt file, got {'another file' if path.exists() else 'nothing'}"
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


def expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor of a checkpoint has by its configuration."""
    shapes = tensor_shapes(checkpoint.config)
    width = checkpoint.config.hidden_size
    if checkpoint.vision is not None:
        shapes |= vision_shapes(checkpoint.vision, width)
    if checkpoint.sound is not None:
        shapes |= sound_shapes(checkpoint.sound, width)
    if checkpoint.encoder is not None:
        shapes |= encoder_shapes(checkpoint.encoder)
    for i, size in enumerate(checkpoint.embedding.dense_sizes if checkpoint.embedding else ()):
        shapes[f"dense.{i}.weight"] = (size, width)
        width = size
    return shapes


def _read_folder(folder: Path, *, text_only: bool) -> Checkpoint:
    raw = read_json(folder, "config.json")
    if raw.get("model_type") in ENCODER_DECODERS:
        return _read_pair(folder, raw, text_only=text_only)
    has_images = raw.get("model_type") in VISION_MODEL_TYPES
    if has_images and text_only:
        check_text_only(raw)
        LOGGER.warning("%s: exporting the text model; what it has for images is left out", folder)
    vision, sound = None, None
    if raw.get("model_type") == RECURRENT_TYPE:
        config = recurrent_config(raw)
    elif is_newer(raw):
        config = read_newer_config(raw)
        vision, sound = read_newer_towers(folder, raw, text_only=text_only)
    else:
        config = GemmaConfig.from_hf(text_config(raw) if has_images else raw)
        vision = read_vision(folder, raw) if has_images and not text_only else None
    our_name = partial(_our_name, config=config, has_images=has_images)
    found = _named(folder, our_name, with_pictures=vision is not None, with_sound=sound is not None)
    tensors = without_head(found)
    if vision is not None:
        tensors = with_flat_kernels(tensors, vision)
    embedding = None
    if (folder / MODULES).exists() or config.model_type == EMBEDDING_GEMMA2:
        embedding, dense_folders = read_sentence_folder(folder, config, raw)
        tensors = _with_dense(folder, tensors, dense_folders)
    tokenizer_model = partial(tokenizer_bytes, folder, config.vocab_size)
    if vision is not None:
        check_markers(folder, vision, raw, tokenizer_model)
    if sound is not None:
        check_sound_markers(folder, sound, raw, tokenizer_model)
    checkpoint = _with_texts(folder, raw, config, tensors, tokenizer_model)
    return replace(checkpoint, embedding=embedding, vision=vision, sound=sound)


def _with_dense(
    folder: Path, tensors: Mapping[str, StoredTensor], dense_folders: Sequence[str]
) -> dict[str, StoredTensor]:
    """Return tensors with those of the dense layers behind the pooling, which are numbered.

    The first one of an EmbeddingGemma 2 is its projection.
    """
    named = {"dense.0.weight" if n == PROJECTION else n: t for n, t in tensors.items()}
    for number, dense in enumerate(dense_folders, start=int(PROJECTION in tensors)):
        parts = read_safetensors(inside(folder, f"{dense}/model.safetensors"))
        named |= by_name(
            folder, [(f"dense.{number}.{t.name.removeprefix('linear.')}", t) for t in parts]
        )
    return named


def _read_pair(folder: Path, raw: Mapping[str, Any], *, text_only: bool) -> Checkpoint:
    """Read a folder of an encoder and its decoder."""
    config, encoder = encoder_decoder_configs(raw)
    if (folder / MODULES).exists():
        raise CheckpointError(
            f"{folder / MODULES}: expected none beside a {config.model_type} model, whose encoder "
            "embeds with --tasks embed; remove the file"
        )
    has_images = config.model_type == "t5gemma2"
    if has_images and text_only:
        LOGGER.warning("%s: exporting the text model; what it has for images is left out", folder)
    our_name = partial(stack_name, model_type=config.model_type)
    found = _named(folder, our_name, with_pictures=not (has_images and text_only))
    tensors = without_copies(found, config)
    tokenizer_model = partial(tokenizer_bytes, folder, config.vocab_size)
    check_start(folder, raw, tokenizer_model)
    vision = None
    if has_images and not text_only:
        vision = read_pictures(folder, raw, tokenizer_model)
        tensors = with_flat_kernels(tensors, vision)
    checkpoint = _with_texts(folder, raw, config, tensors, tokenizer_model)
    return replace(checkpoint, encoder=encoder, vision=vision)


def _named(
    folder: Path,
    our_name: Callable[[str], str | None],
    *,
    with_pictures: bool,
    with_sound: bool = False,
) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by our names for them.

    Args:
        folder: The folder.
        our_name: Function from a tensor's name to ours, or to None if no graph needs it.
        with_pictures: Whether to keep the tensors of a tower of pictures.
        with_sound: Whether to keep those of a tower of sound.
    """
    left_out = [
        is_part
        for is_part, is_kept in ((is_of_pictures, with_pictures), (is_of_sound, with_sound))
        if not is_kept
    ]
    stored = [t for file in _safetensors_files(folder) for t in read_safetensors(file)]
    named = [(name, t) for t in stored if (name := our_name(t.name)) is not None]
    kept = [(n, t) for n, t in named if not any(is_part(n) for is_part in left_out)]
    return by_name(folder, kept)


def _with_texts(
    folder: Path,
    raw: Mapping[str, Any],
    config: GemmaConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer_model: Callable[[], bytes],
) -> Checkpoint:
    """Return a checkpoint of tensors with what the folder has beside them for texts."""
    template = chat_template(folder)
    config = replace(config, suppress_tokens=suppress_tokens(folder, config.vocab_size))
    return Checkpoint(
        name=folder.name,
        path=folder,
        format="safetensors",
        config=config,
        tensors=tensors,
        norm_offset=config.norm_offset,
        tokenizer_model=tokenizer_model,
        eos_token_ids=eos_token_ids(
            folder, raw, config.vocab_size, tokenizer_model if template else None
        ),
        chat_template=template,
        legal_files=legal_files(folder),
        license=stated_license(folder),
    )


def _our_name(name: str, config: GemmaConfig, *, has_images: bool) -> str | None:
    """Return our name of a Hugging Face tensor, or None if no graph needs it."""
    if config.model_type in NEWER:
        return newer_name(name, config)
    if not has_images:
        is_head = name.removeprefix("language_model.") == HEAD
        return HEAD if is_head else layer_name(name.removeprefix("model."), config)
    name = MODEL_PREFIX.sub("", name, count=1)
    if is_of_pictures(name):
        return vision_name(name)
    return layer_name(name.removeprefix("language_model.").removeprefix("model."), config)


def layer_name(name: str, config: GemmaConfig) -> str:
    """Return our name of a decoder's tensor, without a prefix."""
    if config.model_type == "vaultgemma":  # Gemma 1's block under the names of later ones
        return name.replace("pre_feedforward_layernorm", "post_attention_layernorm")
    if config.model_type == RECURRENT_TYPE and name == "final_norm.weight":
        return "norm.weight"
    return name


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the shards that the index names, or the single file."""
    names = ["model.safetensors"]
    if inside(folder, INDEX).exists():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not are_texts(weight_map):
            raise CheckpointError(
                f"{folder / INDEX}: expected weight_map with the file of each tensor, got "
                f"{reprlib.repr(weight_map)}"
            )
        names = sorted(set(weight_map.values()))
    files = []
    for name in names:
        file = inside(folder, name)
        if not is_file(file):
            raise CheckpointError(f"{file}: expected a safetensors file, got nothing")
        files.append(file)
    return files


def read_safetensors(file: Path) -> list[StoredTensor]:
    """Describe the tensors of one safetensors file from its header alone.

    Raises:
        CheckpointError: the header is damaged, or does not fit the file's size.
    """
    size = file_bytes(file)
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, MAX_FILE_BYTES):
            raise CheckpointError(
                f"{file}: expected a safetensors header of at most "
                f"{max(0, min(size - 8, MAX_FILE_BYTES)):,} bytes, got {length:,}; copy it again"
            )
        header = json_object(stream.read(length), file)
    header.pop("__metadata__", None)
    check_count(file, len(header))
    tensors = [_described(file, name, entry, 8 + length) for name, entry in header.items()]
    spans = (Span(raw.offset, raw.offset + raw.length, t.name) for t in tensors if (raw := t.raw))
    check_spans(file, spans, 8 + length, size)
    return tensors


def _described(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Return one tensor of a safetensors header, whose offsets count from `start`."""
    check_name(file, name)
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{file}: expected dtype, shape and data_offsets of {name}, got {reprlib.repr(entry)}; "
            "copy it again"
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    shape = [1] if shape == [] else shape  # a single number
    dtype = SAFETENSORS_DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: expected {name} as one of {', '.join(SAFETENSORS_DTYPES)}, "
            f"got {reprlib.repr(kind)}"
        )
    check_shape(file, name, shape)
    if (
        not isinstance(offsets, list)
        or [type(offset) for offset in offsets] != [int, int]
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise CheckpointError(
            f"{file}: expected the offsets of {name} as two whole numbers, the smaller one first, "
            f"got {reprlib.repr(offsets)}; copy it again"
        )
    length = offsets[1] - offsets[0]
    check_length(file, name, shape, length, NUMPY_DTYPES[dtype].itemsize)
    raw = RawBytes(file=file, offset=start + offsets[0], length=length)
    return raw_tensor(name, tuple(shape), dtype, raw)
