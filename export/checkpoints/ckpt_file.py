"""Reads a `.ckpt` file of gemma_pytorch: Gemma 1, 2 or 3.

The file is loaded under fake tensors, which hold no data but know its offset in the file. The file
does not name its architecture, so its shapes are matched with the released sizes. Source of the
names: `gemma/model.py` and `gemma/gemma3_model.py` of gemma_pytorch.
"""

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.released_sizes import SIZES
from export.checkpoints.sidecar_files import legal_files, tokenizer_bytes
from export.checkpoints.tensors import NUMPY_DTYPES, Checkpoint, RawBytes, StoredTensor, raw_tensor
from export.checkpoints.tokenizer_model import END_OF_TURN

LOGGER = logging.getLogger("export")
DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}
EMBEDDING = re.compile(r"(text_token_)?embedder\.")
IMAGE_PREFIXES = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_projection.")
TORCH_VERSION = "2.13.0"
"""The version of torch in which its private parts were read."""
ROTARY = "freqs_cis"
SCALER = "_scaler"
"""Suffix of the tensor that holds an int8 weight's row factors."""

Tensors = dict[str, StoredTensor]


def read_ckpt(path: Path) -> Checkpoint:
    """Open one `.ckpt` file with `tokenizer.model` beside it."""
    found = _stored_tensors(path)
    text = {name: t for name, t in found.items() if not name.startswith(IMAGE_PREFIXES)}
    if len(text) < len(found):
        LOGGER.warning("%s: exporting the text model; what it has for images is left out", path)
    tensors = _dequantized({_our_name(name): tensor for name, tensor in text.items()})
    config = _config(path, tensors)
    tokenizer = Tokenizer(tokenizer_bytes(path.parent))
    # Released files list no end tokens: add the end of turn if the vocabulary has one.
    turn_end = tokenizer.control_pieces.get(END_OF_TURN)
    return Checkpoint(
        name=path.stem,
        path=path,
        format="ckpt",
        config=config,
        tensors=_split(tensors, config),
        norm_offset=1.0,
        tokenizer_model=lambda: tokenizer_bytes(path.parent),
        eos_token_ids=(tokenizer.eos_token_id, *([] if turn_end is None else [turn_end])),
        chat_template=None,
        legal_files=legal_files(path.parent),
    )


def _stored_tensors(path: Path) -> Tensors:
    """Describe the tensors of the file, without the rotary tables, which can be computed."""
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a file that torch.load reads with weights_only, got: {reason}"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected model_state_dict, as in gemma_pytorch, got none")
    return {
        name: _stored(path, name, tensor)
        for name, tensor in state.items()
        if not name.endswith(ROTARY)
    }


def _stored(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: expected {name} as a contiguous tensor of {', '.join(DTYPES.values())}, "
            f"got {tensor.dtype} with strides {tensor.stride()}"
        )
    start = _checkpoint_offset(tensor)
    if start is None:
        raise CheckpointError(f"{path}: expected the zip format of torch.save, got an older one")
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    raw = RawBytes(file=path, offset=offset, length=tensor.numel() * tensor.element_size())
    return raw_tensor(name, tuple(tensor.shape), dtype, raw)


def _checkpoint_offset(tensor: torch.Tensor) -> int | None:
    """Return the file offset of a storage, None for the old format of torch.save.

    `torch.load` sets this private attribute under FakeTensorMode, which is private too, in torch
    2.13. `tests/test_private_parts.py` fails when it changes.
    """
    try:
        return tensor.untyped_storage()._checkpoint_offset
    except AttributeError as error:
        raise CheckpointError(
            f"torch {torch.__version__}: expected the file offset of a tensor as in version "
            f"{TORCH_VERSION}, got: {error}; install torch=={TORCH_VERSION}"
        ) from error


def _our_name(name: str) -> str:
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
        weights[name] = replace(tensor, raw=None, rows=_scaled_rows(tensor, scaler))
    return weights


def _scaled_rows(tensor: StoredTensor, scaler: StoredTensor) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        factors = scaler.rows(start, stop).astype(np.float32)
        return tensor.rows(start, stop).astype(np.float32) * factors[:, None]

    return rows


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
    embedding = found.pop("embed_tokens.weight", (0, 0))
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
