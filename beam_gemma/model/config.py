"""Architecture of a checkpoint, with the field names of Hugging Face's `config.json`.

Covers the text models of Gemma 1, 2 and 3 and their derivatives: one block with switches. Facts
and defaults follow the configuration classes of transformers 5.23
(`models/*gemma*/configuration_*.py`).
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import ConfigError, nearest

FULL = "full_attention"
SLIDING = "sliding_attention"
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "vaultgemma")

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
PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Keys of the pattern of layers: the one that Gemma 3 reads, and a copy beside `layer_types`."""
ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "factor",
                       "original_max_position_embeddings"})  # fmt: skip
"""Keys of rotary parameters that are read, or that linear scaling does not use."""

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
}
"""Largest sizes that are read: at least 8 times those of any released Gemma."""
FACTORS = ("query_pre_attn_scalar", "rms_norm_eps", "attn_logit_softcapping",
           "final_logit_softcapping")  # fmt: skip
OPTIONAL_FACTORS = FACTORS[2:]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one kind of layer."""

    rope_theta: float
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """Linear scaling: positions are divided by this factor."""

    def __post_init__(self) -> None:
        check_factor("rope_theta", self.rope_theta)
        check_factor("rope factor", self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmaConfig:
    """Configuration of a Gemma model; derived sizes are properties."""

    model_type: str
    """One of `MODEL_TYPES`; determines query-key norm and post norms."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest sequence, prompt and completion together, in tokens."""
    layer_types: tuple[str, ...]
    """`full_attention` or `sliding_attention` for each layer."""
    sliding_window: int | None
    """Tokens visible to a query in a sliding layer, itself included; see `window`."""
    rope_parameters: tuple[tuple[str, RopeParameters], ...]
    """Rotary parameters for each layer type in use."""
    query_pre_attn_scalar: float
    """Attention scores are divided by the square root of this value."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_bidirectional_attention: bool = False
    """True if tokens also attend to later ones, as in EmbeddingGemma, which is no decoder."""

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}"
                f"{nearest(self.model_type, MODEL_TYPES)}"
            )
        self._check_numbers()
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types: expected {self.num_hidden_layers} entries (num_hidden_layers), "
                f"got {len(self.layer_types)}"
            )
        unknown = set(self.layer_types) - {FULL, SLIDING}
        if unknown:
            raise ConfigError(
                f"layer_types: expected {FULL} or {SLIDING}, got {reprlib.repr(sorted(unknown))}"
            )
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ConfigError("sliding_window: expected a number of tokens, got none")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        if not self.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings: expected true for a Gemma model, got false")
        if self.use_bidirectional_attention:
            self._check_two_sided()

    def _check_numbers(self) -> None:
        for name in MAX_SIZES:
            value = getattr(self, name)
            if value is not None or name != "sliding_window":
                check_size(name, value)
        for name in FACTORS:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL_FACTORS:
                check_factor(name, value)

    def _check_two_sided(self) -> None:
        if self.model_type != "gemma3_text":
            raise ConfigError(
                f"use_bidirectional_attention: expected false in a {self.model_type} model, "
                "got true"
            )
        # Before transformers 5.23, loading and saving a model wrote half of its window plus 1, and
        # the next load halved that again. Released windows are even.
        if self.sliding_window and self.sliding_window % 2:
            raise ConfigError(
                f"sliding_window: expected an even number in a two-sided model, got "
                f"{self.sliding_window}, as older releases of transformers save half of it; "
                f"put {2 * (self.sliding_window - 1)} where that is what the model was trained with"
            )

    @property
    def attention_scale(self) -> float:
        """Factor applied to query-key products."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def has_qk_norm(self) -> bool:
        """True if queries and keys are normalized per head before the rotation."""
        return self.model_type == "gemma3_text"

    @property
    def has_post_norms(self) -> bool:
        """True if attention and feed-forward outputs are normalized before the residual sum."""
        return self.model_type in ("gemma2", "gemma3_text")

    @property
    def groups(self) -> tuple[str, ...]:
        """The layer types in use, in the order of their first layer."""
        return tuple(dict.fromkeys(self.layer_types))

    def window(self, layer_type: str) -> int | None:
        """Return the number of tokens visible to a query in layers of this type, or None for all.

        With `use_bidirectional_attention`, a query sees half as many to each side:
        abs(distance) <= window // 2.
        """
        return self.sliding_window if layer_type == SLIDING else None

    def rope(self, layer_type: str) -> RopeParameters:
        """Return the rotary parameters of layers of this type."""
        return dict(self.rope_parameters)[layer_type]

    def layers_of(self, layer_type: str) -> tuple[int, ...]:
        """Return the indices of the layers of one type."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == layer_type)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "GemmaConfig":
        """Read a `config.json`; the error for an unknown key suggests the nearest known one.

        Raises:
            ConfigError: a key is missing, unknown, or requests an unsupported feature.
        """
        reader = Reader(raw)
        model_type = reader.take("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type: expected one of {', '.join(MODEL_TYPES)}, "
                f"got {reprlib.repr(model_type)}"
            )
        _check_activation(reader)
        reader.require("attention_bias", (False, None))
        reader.require("pruned_heads", ({}, None))
        num_layers = reader.size("num_hidden_layers")
        head_dim = reader.size("head_dim", 256)
        if head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number, got {head_dim}")
        layer_types = _layer_types(reader, model_type, num_layers)
        config = cls(
            model_type=model_type,
            vocab_size=reader.size("vocab_size"),
            hidden_size=reader.size("hidden_size"),
            intermediate_size=reader.size("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=reader.size("num_attention_heads"),
            num_key_value_heads=reader.size("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=reader.size("max_position_embeddings"),
            layer_types=layer_types,
            sliding_window=reader.size("sliding_window", None),
            rope_parameters=_rope_parameters(reader, model_type, layer_types),
            query_pre_attn_scalar=_query_scalar(reader, model_type, head_dim),
            attn_logit_softcapping=_softcap(reader, "attn_logit_softcapping", model_type),
            final_logit_softcapping=_softcap(reader, "final_logit_softcapping", model_type),
            rms_norm_eps=check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6)),
            tie_word_embeddings=reader.switch("tie_word_embeddings", default=True),
            use_bidirectional_attention=reader.switch("use_bidirectional_attention", default=False),
        )
        reader.finish()
        return config


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


def _check_activation(reader: Reader) -> None:
    """Check that the feed-forward's function is GELU in its tanh form.

    The first releases of Gemma 1 call it `gelu` in `hidden_act`, which later models do not read.
    """
    reader.require("hidden_activation", ("gelu_pytorch_tanh", None))
    reader.require("hidden_act", ("gelu_pytorch_tanh", "gelu", None))


def _query_scalar(reader: Reader, model_type: str, head_dim: int) -> float:
    """Return the number under the root in the attention scale; in Gemma 1, the head size."""
    if model_type == "gemma":
        return float(head_dim)
    value = reader.take("query_pre_attn_scalar", 256)
    return check_factor("query_pre_attn_scalar", value)


def _layer_types(reader: Reader, model_type: str, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer, by the published pattern if config.json does not list them.

    Gemma 1 has no windows; Gemma 2 starts with a sliding layer and alternates; in Gemma 3, every
    sixth layer is full. Older Gemma 3 files set `sliding_window_pattern`. VaultGemma's file lists
    every layer; its class alternates.
    """
    patterns = [reader.take(key, None) for key in PATTERN_KEYS]
    given = reader.take("layer_types", None)
    if given is not None:
        if not isinstance(given, list | tuple) or not all(k in (FULL, SLIDING) for k in given):
            raise ConfigError(
                f"layer_types: expected a list of {FULL} and {SLIDING}, got {reprlib.repr(given)}"
            )
        if model_type == "gemma" and SLIDING in given:
            raise ConfigError(f"layer_types: expected {FULL} alone in a gemma model, got {SLIDING}")
        return tuple(given)
    if model_type == "gemma":
        return (FULL,) * num_layers
    period = _period(patterns, model_type)
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


def _period(patterns: Iterable[Any], model_type: str) -> int:
    """Return after how many layers a full one comes, from the values of `PATTERN_KEYS`.

    Raises:
        ConfigError: one is no such number, or another than the class of the model goes by.
    """
    usual = 6 if model_type == "gemma3_text" else 2
    read, copied = (usual if value is None else value for value in patterns)
    for value in (read, copied):
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"sliding_window_pattern: expected a whole number above 0, got "
                f"{reprlib.repr(value)}"
            )
    if (read != usual and model_type != "gemma3_text") or copied not in (usual, read):
        raise ConfigError(
            f"sliding_window_pattern: expected {usual} in a {model_type} model without "
            f"layer_types, got {read} and {copied}; list the layers in layer_types"
        )
    return read


def _rope_parameters(
    reader: Reader, model_type: str, layer_types: tuple[str, ...]
) -> tuple[tuple[str, RopeParameters], ...]:
    """Read rotary parameters in either form: `rope_parameters`, or theta with `rope_scaling`.

    In Gemma 3, sliding layers have parameters of their own, and `rope_scaling` is for full layers.
    In the other models all layers share theirs.
    """
    is_gemma3 = model_type == "gemma3_text"
    theta = reader.take("rope_theta", 1e6 if is_gemma3 else 1e4)
    local_theta = reader.take("rope_local_base_freq", 1e4) if is_gemma3 else theta
    scaling = reader.section("rope_scaling")
    given = reader.section("rope_parameters")
    kinds = tuple(dict.fromkeys(layer_types))
    if given is not None and scaling:
        raise ConfigError("rope_scaling: expected none beside rope_parameters, got both")
    if given is not None and is_gemma3 != bool(set(given) & {FULL, SLIDING}):
        expected = f"{FULL} and {SLIDING}" if is_gemma3 else "one set for all layers"
        raise ConfigError(
            f"rope_parameters: expected {expected} in a {model_type} model, got the keys "
            f"{reprlib.repr(sorted(given))}"
        )
    shared = {"rope_theta": theta, **(scaling or {})}
    if not is_gemma3:
        given = dict.fromkeys(kinds, given or shared)
    elif given is None:
        if "type" in shared and "rope_type" not in shared:
            raise ConfigError(
                "rope_scaling: expected the key rope_type, got type, which transformers no longer "
                "reads in Gemma 3; rename it"
            )
        given = {FULL: shared, SLIDING: {"rope_theta": local_theta}}
    for key in sorted(set(given) - {FULL, SLIDING}):
        raise ConfigError(
            f"rope_parameters: the key {reprlib.repr(key)} has no place beside {FULL}"
        )
    return tuple((kind, _rope(kind, section_of(kind, given.get(kind) or {}))) for kind in kinds)


def _rope(kind: str, raw: Mapping[str, Any]) -> RopeParameters:
    for key in sorted(set(raw) - ROPE_KEYS):
        raise ConfigError(
            f"rope_parameters of {kind}: the key {reprlib.repr(key)} is not known"
            f"{nearest(key, ROPE_KEYS)}"
        )
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ConfigError(
            f"rope_type of {kind}: expected default or linear, got {reprlib.repr(rope_type)}"
        )
    for key in ("rope_theta", *(["factor"] if rope_type == "linear" else [])):
        if key not in raw:
            raise ConfigError(
                f"rope_parameters of {kind}: expected {key}, got {reprlib.repr(sorted(raw))}"
            )
    return RopeParameters(
        rope_theta=check_factor(f"rope_theta of {kind}", raw["rope_theta"]),
        factor=check_factor(f"factor of {kind}", raw["factor"] if rope_type == "linear" else 1.0),
    )


def _softcap(reader: Reader, key: str, model_type: str) -> float | None:
    """Return a softcap; Gemma 3 configs may set one that the reference code never applies."""
    default = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key]
    value = reader.take(key, default if model_type in ("gemma2", "vaultgemma") else None)
    if value is not None and model_type == "gemma":
        raise ConfigError(f"{key}: expected none in a gemma model, got {reprlib.repr(value)}")
    if key == "attn_logit_softcapping" and model_type == "gemma3_text":
        return None
    return None if value is None else check_factor(key, value)
