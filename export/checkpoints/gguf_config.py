"""Reads the architecture of a GGUF file of Gemma 1, 2 or 3 from its metadata.

Every key of the architecture is read, compared with what it must be, or refused. Keys and defaults:
llama.cpp's `gguf-py/gguf/constants.py` and `src/llama-model.cpp`.
"""

import reprlib
from typing import Any

import numpy as np

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import check_factor, check_size
from beam_gemma.model.layer_types import FULL, SLIDING
from export.checkpoints.gguf_header import GgufFile

MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# (Model type, layers) of the 27B models: their query_pre_attn_scalar, which GGUF does not record,
# is hidden_size / num_attention_heads.
WIDE_MODELS = {("gemma2", 46), ("gemma3_text", 62)}
ALL_KEYS = frozenset({
    "attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type",
    "vocab_size",
})  # fmt: skip
"""Keys of every architecture, without its name. Linear scaling leaves two of them unused."""
WINDOW_KEYS = frozenset({
    "attention.key_length_swa", "attention.sliding_window", "attention.sliding_window_pattern",
    "attention.value_length_swa", "final_logit_softcapping", "rope.dimension_count_swa",
})  # fmt: skip
KEYS = {
    "gemma": ALL_KEYS,
    "gemma2": ALL_KEYS | WINDOW_KEYS | {"attn_logit_softcapping"},
    "gemma3": ALL_KEYS | WINDOW_KEYS | {"rope.freq_base_swa"},
}
IMAGE_KEYS = ("vision.", "mm.")
"""Starts of the keys of a model's part for images, which is in another file."""


def gguf_config(file: GgufFile) -> GemmaConfig:
    """Return the architecture of a GGUF file.

    Raises:
        CheckpointError: it is no Gemma's, or a key says what cannot be computed.
        ConfigError: a number is missing or out of bounds.
    """
    arch = file.value("general.architecture", "none")
    if arch not in MODEL_TYPES:
        raise CheckpointError(
            f"{file.path}: expected a GGUF of {', '.join(MODEL_TYPES)}, got the architecture "
            f"{reprlib.repr(arch)}"
        )
    keys = _Keys(file, arch)
    keys.check_known()
    model_type, layers = MODEL_TYPES[arch], keys.size("block_count", "num_hidden_layers")
    head_dim = keys.size("attention.key_length", "head_dim")
    for key in ("attention.value_length", "rope.dimension_count", "attention.key_length_swa",
                "attention.value_length_swa", "rope.dimension_count_swa"):  # fmt: skip
        keys.require(key, head_dim)
    vocab_size = _embedding_rows(file)
    keys.require("vocab_size", vocab_size)
    keys.require("attention.causal", True)
    heads = keys.size("attention.head_count", "num_attention_heads")
    hidden = keys.size("embedding_length", "hidden_size")
    raw = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": keys.get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": keys.get("context_length"),
        "rms_norm_eps": keys.factor("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": _rope(keys, model_type),
    }
    if model_type != "gemma":
        raw["sliding_window"] = keys.get("attention.sliding_window")
        raw["layer_types"] = _layer_types(keys, layers)
        raw["query_pre_attn_scalar"] = (
            hidden // heads if (model_type, layers) in WIDE_MODELS else head_dim
        )
    if model_type == "gemma2":
        raw["attn_logit_softcapping"] = keys.get("attn_logit_softcapping", 50.0)
        raw["final_logit_softcapping"] = keys.get("final_logit_softcapping", 30.0)
    if model_type == "gemma3_text":
        raw["final_logit_softcapping"] = keys.get("final_logit_softcapping", 0.0) or None
    return GemmaConfig.from_hf({key: value for key, value in raw.items() if value is not None})


class _Keys:
    """The metadata of one architecture, without its name before each key."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self._file, self._arch = file, arch

    def check_known(self) -> None:
        """Check that no key says anything that is not read.

        Raises:
            CheckpointError: one does.
        """
        prefix, known = f"{self._arch}.", KEYS[self._arch]
        for full in self._file.values:
            key = full.removeprefix(prefix)
            if full.startswith(prefix) and key not in known and not key.startswith(IMAGE_KEYS):
                raise CheckpointError(
                    f"{self._file.path}: the key {full!r:.80} is not known in a "
                    f"{self._arch} model{nearest(key, known)}"
                )

    def get(self, key: str, *default: Any) -> Any:
        return self._file.value(f"{self._arch}.{key}", *default)

    def size(self, key: str, name: str) -> int:
        return check_size(name, self.get(key))

    def factor(self, key: str, default: float) -> float:
        """Return a number above 0; the file's float32 is read as the decimal it stands for."""
        value = check_factor(f"{self._arch}.{key}", self.get(key, default))
        return float(str(np.float32(value)))

    def require(self, key: str, expected: Any) -> None:
        value = self.get(key, expected)
        if value != expected:
            raise self.fault(key, str(expected), value)

    def fault(self, key: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: expected {self._arch}.{key} as {expected}, got "
            f"{reprlib.repr(value)}"
        )


def _rope(keys: _Keys, model_type: str) -> dict[str, Any]:
    """Return rotary parameters; in Gemma 3, sliding layers have a base of their own, unscaled."""
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise keys.fault("rope.scaling.type", "none or linear", kind)
    keys.require("rope.scaling.attn_factor", 1.0)
    old_name = keys.factor("rope.scale_linear", 1.0)
    factor = 1.0 if kind == "none" else keys.factor("rope.scaling.factor", old_name)
    is_gemma3 = model_type == "gemma3_text"
    theta = keys.factor("rope.freq_base", 1e6 if is_gemma3 else 1e4)
    rope = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if not is_gemma3:
        return rope
    return {FULL: rope, SLIDING: {"rope_theta": keys.factor("rope.freq_base_swa", 1e4)}}


def _layer_types(keys: _Keys, layers: int) -> list[str] | None:
    """Return the type of each layer, or None for those that the architecture has."""
    key = "attention.sliding_window_pattern"
    pattern = keys.get(key, None)
    if pattern is None:
        return None
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or [type(is_sliding) for is_sliding in pattern] != (
        [bool] * layers
    ):
        raise keys.fault(key, f"a number above 0, or true or false for {layers} layers", pattern)
    return [SLIDING if is_sliding else FULL for is_sliding in pattern]


def _embedding_rows(file: GgufFile) -> int:
    """Return the vocabulary size."""
    for tensor in file.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    raise CheckpointError(f"{file.path}: expected the tensor token_embd.weight, got none")
