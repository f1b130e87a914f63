"""Checked access to the keys of a Hugging Face `config.json`."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from beam_gemma.errors import ConfigError, nearest

# Keys of config.json that do not change what this project computes: training, generation, library.
IGNORED_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
    "_flash_attn_2_enabled", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
IGNORED_PREFIX = "unsloth_"
"""Start of the keys in which Unsloth records what it did to a file."""
NEWER_SIZES = {
    "global_head_dim": 1 << 13,
    "num_global_key_value_heads": 1 << 12,
    "hidden_size_per_layer_input": 1 << 14,
    "vocab_size_per_layer_input": 1 << 22,
    "altup_num_inputs": 64,
    "laurel_rank": 1 << 14,
    "num_experts": 1 << 12,
    "top_k_experts": 1 << 12,
    "moe_intermediate_size": 1 << 18,
}
"""Largest sizes of what only Gemma 3n, Gemma 4 and EmbeddingGemma 2 have."""
MAX_SIZES = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
    "lru_width": 1 << 17,
    "conv1d_width": 64,
    **NEWER_SIZES,
}
"""Largest sizes that are read: at least 8 times those of any released Gemma."""
OPTIONAL_SIZES = ("sliding_window", "lru_width", "conv1d_width", *NEWER_SIZES)
FACTORS = ("query_pre_attn_scalar", "rms_norm_eps", "partial_rotary_factor",
           "attn_logit_softcapping", "final_logit_softcapping")  # fmt: skip
OPTIONAL_FACTORS = FACTORS[3:]
MAX_FACTOR = 1e12
"""Larger numbers, of which float32 makes infinities where they are multiplied, are refused."""


def check_size(name: str, value: Any) -> int:
    """Return a size of `MAX_SIZES`, which is a whole number from 1 to its limit.

    Raises:
        ConfigError: it is not.
    """
    if type(value) is not int or not 1 <= value <= MAX_SIZES[name]:
        raise ConfigError(
            f"{name}: expected a whole number from 1 to {MAX_SIZES[name]:,}, "
            f"got {reprlib.repr(value)}"
        )
    return value


def check_factor(name: str, value: Any) -> float:
    """Return a number above 0 as float.

    Raises:
        ConfigError: it is no number, infinite, or not above 0.
    """
    if type(value) not in (int, float) or not 0 < value < MAX_FACTOR:
        raise ConfigError(
            f"{name}: expected a number above 0 and below {MAX_FACTOR:g}, got {reprlib.repr(value)}"
        )
    return float(value)


class Reader:
    """Takes keys out of a config.json and keeps track of unread ones."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Start with all keys unread."""
        self.left = dict(raw)
        self.seen: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        """Take a value, or the default where the key is missing; without one, that is an error."""
        self.seen.add(key)
        if key in self.left:
            return self.left.pop(key)
        if not default:
            raise ConfigError(f"config.json: expected the key {key!r}, got none")
        return default[0]

    def size(self, key: str, *default: int | None) -> Any:
        """Take a size of `MAX_SIZES`, or None where that is the default."""
        value = self.take(key, *default)
        return None if value is None and None in default else check_size(key, value)

    def switch(self, key: str, *, default: bool) -> bool:
        """Take true or false; null stands for the default."""
        value = self.take(key, default)
        if not isinstance(value, bool | None):
            raise ConfigError(f"{key}: expected true or false, got {reprlib.repr(value)}")
        return default if value is None else value

    def section(self, key: str) -> Mapping[str, Any] | None:
        """Take a dictionary, or None if there is none."""
        value = self.take(key, None)
        return None if value is None else section_of(key, value)

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Take a value that must be one of those allowed; a missing key stands for the first."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{key}: expected one of {allowed}, got {reprlib.repr(value)}")

    def finish(self) -> None:
        """Check that no key is left that is not known."""
        check_keys(self.left, self.seen)


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Check that each key is known, or is one of those that change nothing here.

    Raises:
        ConfigError: one is neither; the message suggests the nearest known one.
    """
    known = {*known, *IGNORED_KEYS}
    for key in sorted(set(keys) - known):
        if not key.startswith(IGNORED_PREFIX):
            raise ConfigError(
                f"config.json: the key {reprlib.repr(key)} is not known{nearest(key, known)}"
            )


def section_of(key: str, value: Any) -> Mapping[str, Any]:
    """Return the value of a key that must hold a dictionary."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a dictionary, got {reprlib.repr(value)}")
    return value
