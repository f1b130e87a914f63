"""Reads a GGUF file of Gemma 1, 2 or 3.

GGUF stores norm weights as 1 + w and has its own tensor names; the `gguf` package decodes block
quantizations. Metadata keys: ggml's `docs/gguf.md` and llama.cpp's `gguf-py/gguf/constants.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import FULL, SLIDING, GemmaConfig
from export.checkpoints.tensors import Checkpoint, RawBytes, StoredTensor, raw_tensor
from export.checkpoints.tokenizer_model import END_OF_TURN, sentencepiece_from_gguf

MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
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
# (Model type, layers) of the 27B models: their query_pre_attn_scalar, which GGUF does not record,
# is hidden_size / num_attention_heads.
WIDE_MODELS = {("gemma2", 46), ("gemma3_text", 62)}


def read_gguf(path: Path) -> Checkpoint:
    """Open one GGUF file."""
    reader = GGUFReader(path)
    config = _config(reader, path)
    names = _Names(config)
    tensors = {names.ours(tensor.name): _stored(path, tensor) for tensor in reader.tensors}
    return Checkpoint(
        name=path.stem,
        path=path,
        format="gguf",
        config=config,
        tensors=tensors,
        norm_offset=0.0,
        tokenizer_model=lambda: sentencepiece_from_gguf(reader),
        eos_token_ids=_eos_token_ids(reader),
        chat_template=_value(reader, "tokenizer.chat_template", None),
    )


def _config(reader: GGUFReader, path: Path) -> GemmaConfig:
    arch = _value(reader, "general.architecture", "none")
    if arch not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: expected a GGUF of {', '.join(MODEL_TYPES)}, got the architecture {arch!r}"
        )

    def get(key: str, *default: Any) -> Any:
        return _value(reader, f"{arch}.{key}", *default)

    model_type, layers = MODEL_TYPES[arch], get("block_count")
    head_dim, heads = get("attention.key_length"), get("attention.head_count")
    hidden = get("embedding_length")
    theta = get("rope.freq_base", 1e6 if model_type == "gemma3_text" else 1e4)
    local_theta = get("rope.freq_base_swa", 1e4)
    scaling = {"rope_type": "linear", "factor": get("rope.scaling.factor", 1.0)}
    raw = {
        "model_type": model_type,
        "vocab_size": _embedding_rows(reader),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            FULL: {"rope_theta": theta, **scaling},
            SLIDING: {"rope_theta": local_theta if model_type == "gemma3_text" else theta},
        },
    }
    if model_type != "gemma":
        raw["sliding_window"] = get("attention.sliding_window")
        raw["query_pre_attn_scalar"] = (
            hidden // heads if (model_type, layers) in WIDE_MODELS else head_dim
        )
    if model_type == "gemma2":
        raw["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0)
        raw["final_logit_softcapping"] = get("final_logit_softcapping", 30.0)
    return GemmaConfig.from_hf(raw)


def _value(reader: GGUFReader, key: str, *default: Any) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default:
        return default[0]
    raise CheckpointError(f"GGUF metadata: expected the key {key}, got none")


def _eos_token_ids(reader: GGUFReader) -> tuple[int, ...]:
    """Return the ids that end a text; for files with a chat template, these include end of turn.

    Not every such file declares that id; some declare it in place of `<eos>`.
    """
    ids = {int(_value(reader, f"tokenizer.ggml.{name}_token_id", 1)) for name in ("eos", "eot")}
    if _value(reader, "tokenizer.chat_template", None):
        pieces = _value(reader, "tokenizer.ggml.tokens", [])
        ids |= {pieces.index(END_OF_TURN)} if END_OF_TURN in pieces else set()
    return tuple(sorted(ids | {1}))


def _embedding_rows(reader: GGUFReader) -> int:
    """Return the vocabulary size; GGUF lists dimensions innermost first."""
    return next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")


class _Names:
    """Maps GGUF tensor names to ours."""

    def __init__(self, config: GemmaConfig) -> None:
        layer = LAYER_NAMES | NORM_NAMES[config.model_type]
        self._table = {"token_embd": "embed_tokens", "output_norm": "norm"}
        for i in range(config.num_hidden_layers):
            self._table |= {f"blk.{i}.{theirs}": f"layers.{i}.{o}" for theirs, o in layer.items()}

    def ours(self, name: str) -> str:
        """Return our name of a tensor, or the GGUF name if the architecture has no such tensor."""
        stem = name.removesuffix(".weight")
        return f"{self._table[stem]}.weight" if stem in self._table else name


def _stored(path: Path, tensor: ReaderTensor) -> StoredTensor:
    shape = tuple(int(dim) for dim in reversed(tensor.shape))
    dtype = RAW_TYPES.get(tensor.tensor_type)
    if dtype is not None:
        raw = RawBytes(file=path, offset=int(tensor.data_offset), length=int(tensor.n_bytes))
        return raw_tensor(tensor.name, shape, dtype, raw)

    def rows(start: int, stop: int) -> np.ndarray:
        return dequantize(tensor.data[start:stop], tensor.tensor_type)

    return StoredTensor(
        name=tensor.name,
        shape=shape,
        dtype=tensor.tensor_type.name,
        raw=None,
        rows=rows,
        coded_rows=lambda start, stop: tensor.data[start:stop],
    )
