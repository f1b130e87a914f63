"""Reads a `.pt` file of the original RecurrentGemma: the weights of `recurrentgemma`, by name.

The file does not name its architecture, so its shapes are matched with the released sizes, as the
original's presets do. Source of the names: `torch/modules.py` and `torch/layers.py` of
`recurrentgemma` 1.0.1.

Dimensions: D hidden, E feed-forward, C channels of a recurrent block, W tokens that the convolution
spans.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.bounds import Span
from export.checkpoints.ckpt_file import saved_tensors, stored_tensor, transposed
from export.checkpoints.released_sizes import RECURRENT_SIZES
from export.checkpoints.sidecar_files import legal_files, tokenizer_bytes
from export.checkpoints.tensors import EMBEDDING, Checkpoint, StoredTensor, by_name
from export.checkpoints.tokenizer_model import turn_ends
from export.checkpoints.torch_file import SavedTensor, saved_content, torch_records

ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "checkpoint", "manifest.ocdbt")
"""Files that Flax and Orbax write at the top of a checkpoint."""
LAYER_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
LAYER_NAMES = {
    "temporal_pre_norm.scale": "temporal_pre_norm.weight",
    "channel_pre_norm.scale": "channel_pre_norm.weight",
    "attention_block.proj_q.weight": "temporal_block.q_proj.weight",
    "attention_block.proj_k.weight": "temporal_block.k_proj.weight",
    "attention_block.proj_v.weight": "temporal_block.v_proj.weight",
    "attention_block.proj_final.weight": "temporal_block.o_proj.weight",
    "attention_block.proj_final.bias": "temporal_block.o_proj.bias",
    "recurrent_block.conv_1d.w": "temporal_block.conv_1d.weight",
    "recurrent_block.conv_1d.b": "temporal_block.conv_1d.bias",
    "recurrent_block.rg_lru.a_param": "temporal_block.rg_lru.recurrent_param",
    "recurrent_block.rg_lru.input_gate.w": "temporal_block.rg_lru.input_gate_weight",
    "recurrent_block.rg_lru.input_gate.b": "temporal_block.rg_lru.input_gate_bias",
    "recurrent_block.rg_lru.a_gate.w": "temporal_block.rg_lru.recurrent_gate_weight",
    "recurrent_block.rg_lru.a_gate.b": "temporal_block.rg_lru.recurrent_gate_bias",
    "mlp_block.ffw_down.weight": "mlp_block.down_proj.weight",
    "mlp_block.ffw_down.bias": "mlp_block.down_proj.bias",
    **{
        f"recurrent_block.{part}.{kind}": f"temporal_block.{part}.{kind}"
        for part in ("linear_x", "linear_y", "linear_out")
        for kind in ("weight", "bias")
    },
}
"""Names of a layer's tensors in the original, and ours for them."""
FUSED = {"mlp_block.ffw_up.w": "weight", "mlp_block.ffw_up.b": "bias"}
"""Names of gate and up projection together: weights [2, D, E] and biases [2, 1, 1, E]."""


def check_no_flax(folder: Path) -> None:
    """Check that a folder is no checkpoint of Flax, which is not read.

    Raises:
        CheckpointError: it is one.
    """
    is_flax = any((folder / name).exists() for name in ORBAX_FILES)
    if is_flax and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: expected config.json and safetensors files, got a checkpoint of Flax, "
            "which is not read; take the model's files for transformers or for PyTorch"
        )


def read_recurrent(path: Path) -> Checkpoint:
    """Open one `.pt` file with `tokenizer.model` beside it.

    Raises:
        CheckpointError: the file is damaged, holds more than weights, or is of no released size.
    """
    records = torch_records(path)
    content = saved_content(path, records)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected the weights of recurrentgemma by name, got none")
    saved = saved_tensors(path, content)
    tensors = by_name(path, _named({n: _stored(path, n, t, records) for n, t in saved.items()}))
    tokenizer = Tokenizer(tokenizer_bytes(path.parent))
    # Released files list no end tokens: add the end of turn if the vocabulary has one.
    return Checkpoint(
        name=path.stem,
        path=path,
        format="pt",
        config=_config(path, tensors),
        tensors=tensors,
        norm_offset=1.0,
        tokenizer_model=lambda: tokenizer_bytes(path.parent),
        eos_token_ids=(tokenizer.eos_token_id, *turn_ends(tokenizer)),
        chat_template=None,
        legal_files=legal_files(path.parent),
    )


def _stored(
    path: Path, name: str, tensor: SavedTensor, records: Mapping[str, Span]
) -> StoredTensor:
    """Describe one tensor; matrices that were converted from Flax lie column by column."""
    if len(tensor.shape) == 2 and tensor.strides == (1, tensor.shape[0]):
        turned = replace(tensor, shape=tensor.shape[::-1], strides=tensor.strides[::-1])
        return transposed(stored_tensor(path, name, turned, records))
    return stored_tensor(path, name, tensor, records)


def _named(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    """Return tensors with our names for them; a name that is not known stays as it is."""
    whole = {"embedder.input_embedding": EMBEDDING, "final_norm.scale": "norm.weight"}
    found = []
    for name, tensor in tensors.items():
        match = LAYER_NAME.fullmatch(name)
        part = match[2] if match else ""
        prefix = f"layers.{match[1]}." if match else ""
        if part in FUSED:
            found += [
                (f"{prefix}mlp_block.{projection}.{FUSED[part]}", _half(tensor, index))
                for index, projection in enumerate(("gate_proj", "up_proj"))
            ]
        elif part in LAYER_NAMES:
            is_convolution = part == "recurrent_block.conv_1d.w"
            stored = _convolution(tensor) if is_convolution else tensor
            found.append((prefix + LAYER_NAMES[part], stored))
        else:
            found.append((whole.get(name, name), tensor))
    return found


def _half(tensor: StoredTensor, index: int) -> StoredTensor:
    """Return one of two projections: its weight as [E, D], or its bias as [E].

    A tensor of another form stays as it is: its shape is no released size's.
    """
    rows, rank = tensor.rows, len(tensor.shape)
    if tensor.shape[:1] != (2,):
        return tensor
    if rank == 3:
        return transposed(
            replace(
                tensor,
                shape=tensor.shape[1:],
                raw=None,
                rows=lambda start, stop: rows(index, index + 1)[0, start:stop],
            )
        )
    if rank != 4 or tensor.shape[1:3] != (1, 1):
        return tensor
    return replace(
        tensor,
        shape=tensor.shape[3:],
        raw=None,
        rows=lambda start, stop: rows(index, index + 1).reshape(-1)[start:stop],
    )


def _convolution(tensor: StoredTensor) -> StoredTensor:
    """Return the weight [W, C] of a convolution as [C, 1, W]; one of another form as it is."""
    if len(tensor.shape) != 2:
        return tensor
    turned = transposed(tensor)
    rows = turned.rows
    shape = (turned.shape[0], 1, turned.shape[1])
    return replace(
        turned, shape=shape, rows=lambda start, stop: np.expand_dims(rows(start, stop), 1)
    )


def _config(path: Path, tensors: Mapping[str, StoredTensor]) -> GemmaConfig:
    """Return the released architecture with these shapes; only the vocabulary size may differ."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    embedding = found.pop(EMBEDDING, ())
    for size in RECURRENT_SIZES:
        shapes = size.tensor_shapes()
        if found | {EMBEDDING: embedding[1:]} == shapes | {EMBEDDING: shapes[EMBEDDING][1:]}:
            return replace(size.config, vocab_size=embedding[0])
    layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
    raise CheckpointError(
        f"{path}: expected the weights of {' or '.join(s.name for s in RECURRENT_SIZES)}, got "
        f"{len(found)} tensors in {layers} layers and an embedding of shape {list(embedding)}; "
        "export a Hugging Face folder instead"
    )
