"""Reads a GGUF file of Gemma 1, 2 or 3.

GGUF stores norm weights as 1 + w and has its own tensor names; the `gguf` package decodes block
quantizations. Metadata keys: llama.cpp's `gguf-py/gguf/constants.py`.
"""

import re
import reprlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from export.checkpoints.bounds import inside
from export.checkpoints.gguf_config import gguf_config
from export.checkpoints.gguf_header import GgufFile, GgufTensor, read_gguf_header
from export.checkpoints.tensors import (
    Checkpoint,
    RawBytes,
    StoredTensor,
    by_name,
    raw_tensor,
    read_rows,
    without_head,
)
from export.checkpoints.tokenizer_model import TURN_ENDS, sentencepiece_from_gguf, strings

RAW_TYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
# In Gemma 1, `post_attention_layernorm` is the norm before the feed-forward.
NORM_NAMES = {
    "gemma": {"ffn_norm": "post_attention_layernorm"},
    "gemma2": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
NORM_NAMES["gemma3_text"] = NORM_NAMES["gemma2"]
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
"""Name of one of several files that a model is split into."""


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, with its other parts if it is one of several.

    Raises:
        CheckpointError: the file is damaged, or lacks what a Gemma has.
        ConfigError: its architecture is not supported.
    """
    file = _whole(read_gguf_header(path))
    config = gguf_config(file)
    names = _Names(config)
    return Checkpoint(
        name=path.stem,
        path=path,
        format="gguf",
        config=config,
        tensors=without_head(
            by_name(path, ((names.ours(t.name), _stored(t.file, t)) for t in file.tensors))
        ),
        norm_offset=0.0,
        tokenizer_model=lambda: sentencepiece_from_gguf(file),
        eos_token_ids=_eos_token_ids(file, config.vocab_size),
        chat_template=_chat_template(file),
    )


def _whole(part: GgufFile) -> GgufFile:
    """Return a file with the tensors of all its parts, as llama.cpp's `gguf-split` names them.

    The metadata of the model is in the first part.

    Raises:
        CheckpointError: a part is missing or belongs to another file.
    """
    count = part.value("split.count", 0)
    if not count or count == 1:
        return part
    name = PART.fullmatch(part.path.name)
    if name is None or type(count) is not int or int(name["count"]) != count:
        raise CheckpointError(
            f"{part.path}: expected the name of one of {reprlib.repr(count)} parts, as in "
            f"model-00001-of-00002.gguf, got another; give all parts the names that they came with"
        )
    parts = []
    for i in range(count):
        path = inside(part.path.parent, f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf")
        parts.append(part if path == part.path else read_gguf_header(path))
        numbers = [parts[i].value(f"split.{key}", None) for key in ("no", "count", "tensors.count")]
        expected = [i, count, part.value("split.tensors.count", None)]
        if numbers != expected:
            raise CheckpointError(
                f"{path}: expected the part that says {expected} of its number, the number of "
                f"parts and of all tensors, got {reprlib.repr(numbers)}; copy all parts again"
            )
    tensors = tuple(tensor for one in parts for tensor in one.tensors)
    if len(tensors) != part.value("split.tensors.count", None):
        raise CheckpointError(
            f"{parts[0].path}: expected {part.value('split.tensors.count'):,} tensors in all "
            f"parts, got {len(tensors):,}; copy all parts again"
        )
    return replace(parts[0], tensors=tensors)


def _eos_token_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text; for files with a chat template, these include end of turn.

    Not every such file declares that id; some declare it in place of `<eos>`.
    """
    pieces = strings(file, "tokenizer.ggml.tokens", [])
    ids = {1}
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        token_id = file.value(key, 1)
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{file.path}: expected {key} below {vocab_size:,}, got {reprlib.repr(token_id)}"
            )
        ids.add(token_id)
    if _chat_template(file):
        ids.update(pieces.index(piece) for piece in TURN_ENDS if piece in pieces)
    return tuple(sorted(ids))


def _chat_template(file: GgufFile) -> str | None:
    template = file.value("tokenizer.chat_template", None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{file.path}: expected the chat template as text, got {reprlib.repr(template)}"
        )
    return template


class _Names:
    """Maps GGUF tensor names to ours."""

    def __init__(self, config: GemmaConfig) -> None:
        layer = LAYER_NAMES | NORM_NAMES[config.model_type]
        self._table = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
        for i in range(config.num_hidden_layers):
            self._table |= {f"blk.{i}.{theirs}": f"layers.{i}.{o}" for theirs, o in layer.items()}

    def ours(self, name: str) -> str:
        """Return our name of a tensor, or the GGUF name if the architecture has no such tensor."""
        stem = name.removesuffix(".weight")
        return f"{self._table[stem]}.weight" if stem in self._table else name


def _stored(path: Path, tensor: GgufTensor) -> StoredTensor:
    raw = RawBytes(file=path, offset=tensor.offset, length=tensor.length)
    dtype = RAW_TYPES.get(tensor.kind)
    if dtype is not None:
        return raw_tensor(tensor.name, tensor.shape, dtype, raw)
    if len(tensor.shape) < 2:
        raise CheckpointError(
            f"{path}: expected {tensor.name} as a matrix, as it is packed as {tensor.kind.name}, "
            f"got the shape {list(tensor.shape)}"
        )
    _check_decoder(path, tensor)
    packed = partial(read_rows, raw, np.dtype(np.uint8), (tensor.length // tensor.shape[0],))

    def rows(start: int, stop: int) -> np.ndarray:
        # A damaged scale overflows or is NaN, which `chunks` finds.
        with np.errstate(all="ignore"):
            values = dequantize(packed(start, stop), tensor.kind)
        return values.reshape(stop - start, *tensor.shape[1:])

    return StoredTensor(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.kind.name,
        raw=None,
        rows=rows,
        coded_rows=packed,
    )


def _check_decoder(path: Path, tensor: GgufTensor) -> None:
    """Check on one block that the `gguf` package decodes this type."""
    _, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: expected {tensor.name} in a number format that the gguf package decodes, "
            f"got {tensor.kind.name}; convert the file to another format"
        ) from error
