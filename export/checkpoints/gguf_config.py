"""Reads the architecture of a GGUF file from its metadata.

Every key of the architecture is read, compared with what it must be, or refused. Keys and defaults:
llama.cpp's `gguf-py/gguf/constants.py` and `src/models`.
"""

import reprlib
from typing import Any

from gguf import PoolingType

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from beam_gemma.model.layer_types import FULL, SLIDING
from export.checkpoints.gguf_header import GgufFile
from export.checkpoints.gguf_keys import EMBEDDER, Keys
from export.checkpoints.gguf_newer import newer_gguf_config

MODEL_TYPES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    EMBEDDER: "gemma3_text",
}
# (Model type, layers) of the 27B models: their query_pre_attn_scalar, which GGUF does not record,
# is hidden_size / num_attention_heads.
WIDE_MODELS = {("gemma2", 46), ("gemma3_text", 62)}
POOLINGS: dict[int, Pooling] = {PoolingType.MEAN: "mean", PoolingType.LAST: "lasttoken"}
DENSE = ("dense_2", "dense_3")
"""Names of the dense layers behind an EmbeddingGemma's pooling."""


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
    keys = Keys(file, arch)
    keys.check_known()
    vocab_size = keys.tensor("token_embd.weight").shape[0]
    keys.require("vocab_size", vocab_size)
    keys.require("attention.causal", arch != EMBEDDER)
    raw = {
        "model_type": MODEL_TYPES[arch],
        "vocab_size": vocab_size,
        "hidden_size": keys.size("embedding_length", "hidden_size"),
        "num_hidden_layers": keys.size("block_count", "num_hidden_layers"),
        "num_attention_heads": keys.size("attention.head_count", "num_attention_heads"),
        "max_position_embeddings": keys.get("context_length"),
        "rms_norm_eps": keys.factor("attention.layer_norm_rms_epsilon", 1e-6),
    }
    if arch in ("gemma3n", "gemma4"):
        return newer_gguf_config(keys, raw)
    return _config(keys, raw)


def _config(keys: Keys, raw: dict[str, Any]) -> GemmaConfig:
    """Return the architecture of a Gemma 1, 2 or 3, or of an EmbeddingGemma."""
    model_type, layers = raw["model_type"], raw["num_hidden_layers"]
    head_dim = keys.size("attention.key_length", "head_dim")
    for key in ("attention.value_length", "rope.dimension_count", "attention.key_length_swa",
                "attention.value_length_swa", "rope.dimension_count_swa"):  # fmt: skip
        keys.require(key, head_dim)
    raw = raw | {
        "intermediate_size": keys.get("feed_forward_length"),
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "rope_parameters": _rope(keys, model_type),
    }
    if model_type != "gemma":
        raw["sliding_window"] = keys.get("attention.sliding_window")
        raw["layer_types"] = keys.layer_types(layers)
        is_wide = (model_type, layers) in WIDE_MODELS
        width = raw["hidden_size"] // raw["num_attention_heads"]
        raw["query_pre_attn_scalar"] = width if is_wide else head_dim
    if model_type == "gemma2":
        raw["attn_logit_softcapping"] = keys.get("attn_logit_softcapping", 50.0)
        raw["final_logit_softcapping"] = keys.get("final_logit_softcapping", 30.0)
    if model_type == "gemma3_text":
        raw["final_logit_softcapping"] = keys.get("final_logit_softcapping", 0.0) or None
        raw["use_bidirectional_attention"] = keys.arch == EMBEDDER
    return GemmaConfig.from_hf({key: value for key, value in raw.items() if value is not None})


def _rope(keys: Keys, model_type: str) -> dict[str, Any]:
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


def gguf_embedding(file: GgufFile, config: GemmaConfig) -> EmbeddingConfig | None:
    """Return the embedding settings of a file that holds an EmbeddingGemma; None of any other.

    The file does not say that embeddings have the length 1: the programs that read it see to that.
    It has none of the model's prompts.

    Raises:
        CheckpointError: its pooling is not supported, or it lacks the dense layers.
    """
    if file.value("general.architecture", None) != EMBEDDER:
        return None
    keys = Keys(file, EMBEDDER)
    pooling = keys.get("pooling_type")
    if pooling not in POOLINGS:
        expected = " or ".join(f"{int(n)} ({name})" for n, name in POOLINGS.items())
        raise keys.fault("pooling_type", expected, pooling)
    return EmbeddingConfig(
        pooling=POOLINGS[pooling],
        dense_sizes=_dense_sizes(keys, config.hidden_size),
        max_tokens=config.max_position_embeddings,
        add_bos=_switch(file, "add_bos_token", default=True),
        add_eos=_switch(file, "add_eos_token", default=False),
    )


def _dense_sizes(keys: Keys, width: int) -> tuple[int, ...]:
    """Return the width after each dense layer."""
    names = {tensor.name for tensor in keys.file.tensors}
    sizes = []
    for name in DENSE:
        if f"{name}.weight" not in names:
            raise CheckpointError(
                f"{keys.file.path}: expected the dense layers {' and '.join(DENSE)}, without which "
                f"an EmbeddingGemma's embeddings are others, got no {name}; convert it with "
                "--sentence-transformers-dense-modules"
            )
        keys.require(f"{name}_feat_in", width)
        width = keys.tensor(f"{name}.weight").shape[0]
        keys.require(f"{name}_feat_out", width)
        sizes.append(width)
    return tuple(sizes)


def _switch(file: GgufFile, name: str, *, default: bool) -> bool:
    key = f"tokenizer.ggml.{name}"
    value = file.value(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{file.path}: expected {key} as true or false, got {reprlib.repr(value)}"
        )
    return value
