"""Reads a `.ckpt` file of gemma_pytorch: Gemma 1, 2 or 3.

The file does not name its architecture, so its shapes are matched with the released sizes; all
towers of pictures have one. Source of the names: `gemma/model.py`, `gemma/gemma3_model.py` and
`gemma/siglip_vision/siglip_vision_model.py` of gemma_pytorch.
"""

import logging
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.bounds import Span, check_count, check_name, check_shape
from export.checkpoints.released_sizes import SIZES, VISION_SIZES
from export.checkpoints.sidecar_files import legal_files, tokenizer_bytes
from export.checkpoints.tensors import (
    NUMPY_DTYPES,
    Checkpoint,
    RawBytes,
    StoredTensor,
    by_name,
    raw_tensor,
)
from export.checkpoints.tokenizer_model import turn_ends
from export.checkpoints.torch_file import SavedTensor, saved_content, torch_records
from export.checkpoints.vision_tensors import (
    PROJECTION,
    is_of_pictures,
    with_flat_kernels,
)

LOGGER = logging.getLogger("export")
DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "CharStorage": "int8",
}
EMBEDDING = re.compile(r"(text_token_)?embedder\.")
IMAGE_PREFIXES = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_projection.")
TOWER_NAMES = (
    ("siglip_vision_model.patch_embedding.", "vision_tower.embeddings.patch_embedding."),
    ("siglip_vision_model.position_embedding.", "vision_tower.embeddings.position_embedding."),
    ("siglip_vision_model.encoder_blocks.", "vision_tower.encoder.layers."),
    ("siglip_vision_model.final_norm.", "vision_tower.post_layernorm."),
    ("mm_soft_embedding_norm.", "multi_modal_projector.mm_soft_emb_norm."),
    ("mm_input_projection.", f"{PROJECTION}:transposed."),
)
"""Starts of names of what a model has for pictures, and what we call it."""
PROJECTED = f"{PROJECTION}:transposed.weight"
"""Name of a projection [text, tower], which graphs read as [tower, text]."""
ROTARY = "freqs_cis"
SCALER = "_scaler"
"""Suffix of the tensor that holds an int8 weight's row factors."""

Tensors = dict[str, StoredTensor]


def read_ckpt(path: Path, *, text_only: bool = False) -> Checkpoint:
    """Open one `.ckpt` file with `tokenizer.model` beside it.

    Args:
        path: The file.
        text_only: Whether to leave out what a model has for pictures.

    Raises:
        CheckpointError: the file is damaged, holds more than weights, or is of no released size.
    """
    found = _stored_tensors(path)
    has_images = any(t.name.startswith(IMAGE_PREFIXES) for t in found)
    if has_images and text_only:
        found = [t for t in found if not t.name.startswith(IMAGE_PREFIXES)]
        LOGGER.warning("%s: exporting the text model; what it has for images is left out", path)
    vision = VISION_SIZES[0].vision if has_images and not text_only else None
    tensors = _dequantized(by_name(path, [(_our_name(t.name), t) for t in found]))
    if vision is not None:
        tensors = _turned(with_flat_kernels(tensors, vision))
    config = _config(path, {n: t for n, t in tensors.items() if not is_of_pictures(n)})
    tokenizer = Tokenizer(tokenizer_bytes(path.parent))
    # Released files list no end tokens: add the end of turn if the vocabulary has one.
    return Checkpoint(
        name=path.stem,
        path=path,
        format="ckpt",
        config=config,
        tensors=_split(tensors, config),
        norm_offset=1.0,
        tokenizer_model=lambda: tokenizer_bytes(path.parent),
        eos_token_ids=(tokenizer.eos_token_id, *turn_ends(tokenizer)),
        chat_template=None,
        legal_files=legal_files(path.parent),
        vision=vision,
    )


def _stored_tensors(path: Path) -> list[StoredTensor]:
    """Describe the tensors of the file, without the rotary tables, which can be computed."""
    records = torch_records(path)
    content = saved_content(path, records)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected model_state_dict, as in gemma_pytorch, got none")
    saved = saved_tensors(path, state)
    return [stored_tensor(path, n, t, records) for n, t in saved.items() if not n.endswith(ROTARY)]


def saved_tensors(path: Path, state: dict[Any, Any]) -> dict[str, SavedTensor]:
    """Return the state of a model, which must be tensors by name.

    Raises:
        CheckpointError: it is something else.
    """
    check_count(path, len(state))
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, SavedTensor):
            raise CheckpointError(
                f"{path}: expected a tensor under each name of the model's state, got "
                f"{reprlib.repr(name)} as {type(tensor).__name__}"
            )
        check_name(path, name)
    return state


def stored_tensor(
    path: Path, name: str, tensor: SavedTensor, records: Mapping[str, Span]
) -> StoredTensor:
    """Describe one tensor; its numbers are part of one record of the file.

    Raises:
        CheckpointError: it is not contiguous, of another type, or beyond its record.
    """
    check_shape(path, name, tensor.shape)
    dtype = DTYPES.get(tensor.storage.kind)
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    # The stride of a dimension of 1 makes no difference.
    is_contiguous = all(
        dim == 1 or stride == theirs
        for dim, stride, theirs in zip(tensor.shape, strides, tensor.strides, strict=True)
    )
    if dtype is None or not is_contiguous:
        raise CheckpointError(
            f"{path}: expected {name} as a contiguous tensor of {', '.join(DTYPES.values())}, "
            f"got {tensor.storage.kind[:80]} with strides {tensor.strides}"
        )
    record = records.get(f"data/{tensor.storage.key}")
    if record is None:
        raise CheckpointError(f"{path}: expected the numbers of {name}, got no record of them")
    item = NUMPY_DTYPES[dtype].itemsize
    raw = RawBytes(
        file=path,
        offset=record.start + tensor.offset * item,
        length=math.prod(tensor.shape) * item,
    )
    if raw.offset + raw.length > record.end:
        raise CheckpointError(
            f"{path}: expected {raw.length:,} bytes of {name}, got the end of its record; copy the "
            "file again"
        )
    return raw_tensor(name, tensor.shape, dtype, raw)


def _our_name(name: str) -> str:
    for theirs, ours in TOWER_NAMES:
        if name.startswith(theirs):
            return (ours + name.removeprefix(theirs)).replace(".o_proj.", ".out_proj.")
    name = EMBEDDING.sub("embed_tokens.", name.removeprefix("model."))
    return name.replace(".query_norm.", ".q_norm.").replace(".key_norm.", ".k_norm.")


def _dequantized(tensors: Tensors) -> Tensors:
    """Return the weights; rows of int8 weights are multiplied with their factors when read."""
    weights = {name: t for name, t in tensors.items() if not name.endswith(SCALER)}
    for name, tensor in weights.items():
        if tensor.dtype != "int8":
            continue
        scaler = tensors.get(name + SCALER)
        if scaler is None:
            raise CheckpointError(f"checkpoint: expected {tensor.name}{SCALER}, got none")
        if scaler.shape != tensor.shape[:1]:
            raise CheckpointError(
                f"checkpoint: expected {scaler.name} of shape {list(tensor.shape[:1])}, got "
                f"{list(scaler.shape)}"
            )
        weights[name] = replace(tensor, raw=None, rows=_scaled_rows(tensor, scaler))
    return weights


def _scaled_rows(tensor: StoredTensor, scaler: StoredTensor) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        factors = scaler.rows(start, stop).astype(np.float32)
        return tensor.rows(start, stop).astype(np.float32) * factors[:, None]

    return rows


def _turned(tensors: Tensors) -> Tensors:
    """Return tensors with the projection of pictures as Hugging Face stores it."""
    rest = dict(tensors)
    matrix = rest.pop(PROJECTED, None)
    if matrix is not None and len(matrix.shape) == 2:
        rest[PROJECTION] = transposed(matrix)
    return rest


def transposed(matrix: StoredTensor) -> StoredTensor:
    """Return a matrix whose rows are the columns of another; each slice reads the whole."""
    rows, num_rows = matrix.rows, matrix.shape[0]
    return replace(
        matrix,
        shape=matrix.shape[::-1],
        raw=None,
        rows=lambda start, stop: np.ascontiguousarray(rows(0, num_rows)[:, start:stop].T),
    )


def _split(tensors: Tensors, config: GemmaConfig) -> Tensors:
    """Split the fused projections by rows into query, key and value projections."""
    queries, keys = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    bounds = {
        "q_proj": (0, queries),
        "k_proj": (queries, queries + keys),
        "v_proj": (queries + keys, queries + 2 * keys),
    }
    result = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." not in name:
            result[name] = tensor
            continue
        if tensor.shape[0] != queries + 2 * keys:
            raise CheckpointError(
                f"checkpoint: expected {tensor.name} with {queries + 2 * keys} rows, "
                f"got {tensor.shape[0]}"
            )
        for part, (start, stop) in bounds.items():
            result[name.replace("qkv_proj", part)] = _row_range(tensor, start, stop)
    return result


def _row_range(tensor: StoredTensor, first: int, last: int) -> StoredTensor:
    shape = (last - first, *tensor.shape[1:])
    if tensor.raw is not None:
        row = int(np.prod(shape[1:])) * NUMPY_DTYPES[tensor.dtype].itemsize
        start, length = tensor.raw.offset + first * row, shape[0] * row
        raw = replace(tensor.raw, offset=start, length=length)
        return raw_tensor(tensor.name, shape, tensor.dtype, raw)
    rows = tensor.rows
    return replace(tensor, shape=shape, rows=lambda a, b: rows(first + a, first + b))


def _config(path: Path, tensors: Tensors) -> GemmaConfig:
    """Return the released architecture with these shapes; only the vocabulary size may differ."""
    found = {name: t.shape for name, t in tensors.items() if ".qkv_proj." not in name}
    embedding = found.pop("embed_tokens.weight", ())
    if len(embedding) != 2:
        raise CheckpointError(
            f"{path}: expected embedder.weight with 2 dimensions, got {list(embedding)}"
        )
    for size in SIZES:
        shapes = size.tensor_shapes()
        parts = ("embed_tokens.", ".q_proj.", ".k_proj.", ".v_proj.")
        if found == {n: s for n, s in shapes.items() if not any(part in n for part in parts)}:
            return replace(size.config, vocab_size=embedding[0])
    layers = sum(".qkv_proj." in name for name in tensors)
    raise CheckpointError(
        f"{path}: expected the shapes of a released size ({', '.join(s.name for s in SIZES)}), got "
        f"{layers} layers of width {embedding[1]}; export a Hugging Face folder instead"
    )
