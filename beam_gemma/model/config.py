"""Architecture of a checkpoint, with the field names of Hugging Face's `config.json`.

Covers the text models of Gemma 1, 2 and 3 and their derivatives: one block with switches. Facts
and defaults follow the configuration classes of transformers 5.23
(`models/*gemma*/configuration_*.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import ConfigError, nearest

FULL = "full_attention"
SLIDING = "sliding_attention"
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "vaultgemma")

# Keys of config.json that do not change what this project computes: training, generation, library.
IGNORED_KEYS = frozenset({
    "_name_or_path", "_sliding_window_pattern", "add_cross_attention", "architectures",
    "attention_dropout", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "sliding_window_pattern", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one kind of layer."""

    rope_theta: float
    """Base of the geometric series of wavelengths."""
    factor: float = 1.0
    """Linear scaling: positions are divided by this factor."""


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
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types: expected {self.num_hidden_layers} entries (num_hidden_layers), "
                f"got {len(self.layer_types)}"
            )
        unknown = set(self.layer_types) - {FULL, SLIDING}
        if unknown:
            raise ConfigError(f"layer_types: expected {FULL} or {SLIDING}, got {sorted(unknown)}")
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
        reader = _Reader(raw)
        model_type = reader.take("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {model_type!r}"
            )
        reader.require("hidden_activation", ("gelu_pytorch_tanh", "gelu", None))
        reader.require("hidden_act", ("gelu_pytorch_tanh", "gelu", None))
        reader.require("attention_bias", (False, None))
        num_layers = reader.take("num_hidden_layers")
        head_dim = reader.take("head_dim", 256)
        layer_types = _layer_types(reader, model_type, num_layers, raw)
        config = cls(
            model_type=model_type,
            vocab_size=reader.take("vocab_size"),
            hidden_size=reader.take("hidden_size"),
            intermediate_size=reader.take("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=reader.take("num_attention_heads"),
            num_key_value_heads=reader.take("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=reader.take("max_position_embeddings"),
            layer_types=layer_types,
            sliding_window=reader.take("sliding_window", None),
            rope_parameters=_rope_parameters(reader, model_type, layer_types),
            query_pre_attn_scalar=float(
                reader.take("query_pre_attn_scalar", head_dim if model_type == "gemma" else 256)
            ),
            attn_logit_softcapping=_softcap(reader, "attn_logit_softcapping", model_type),
            final_logit_softcapping=_softcap(reader, "final_logit_softcapping", model_type),
            rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
            tie_word_embeddings=reader.take("tie_word_embeddings", True),
            use_bidirectional_attention=bool(reader.take("use_bidirectional_attention", False)),
        )
        reader.finish()
        return config


class _Reader:
    """Takes keys out of a config.json and keeps track of unread ones."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.left = dict(raw)
        self.seen: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        self.seen.add(key)
        if key in self.left:
            return self.left.pop(key)
        if not default:
            raise ConfigError(f"config.json: expected the key {key!r}, got none")
        return default[0]

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{key}: expected one of {allowed}, got {value!r}")

    def finish(self) -> None:
        for key in sorted(set(self.left) - IGNORED_KEYS):
            hint = nearest(key, self.seen | IGNORED_KEYS)
            raise ConfigError(f"config.json: the key {key!r} is not known{hint}")


def _layer_types(
    reader: _Reader, model_type: str, num_layers: int, raw: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the type of each layer, by the published pattern if config.json does not list them.

    Gemma 1 has no windows; Gemma 2 starts with a sliding layer and alternates; in Gemma 3, every
    sixth layer is full. Older Gemma 3 files set `sliding_window_pattern`. VaultGemma's file lists
    every layer; its class alternates.
    """
    given = reader.take("layer_types", None)
    if given is not None:
        return tuple(given)
    if model_type == "gemma":
        return (FULL,) * num_layers
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern")
    period = period or (6 if model_type == "gemma3_text" else 2)
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


def _rope_parameters(
    reader: _Reader, model_type: str, layer_types: tuple[str, ...]
) -> tuple[tuple[str, RopeParameters], ...]:
    """Read rotary parameters in either form: `rope_parameters`, or theta with `rope_scaling`."""
    theta = reader.take("rope_theta", 1e6 if model_type == "gemma3_text" else 1e4)
    local_theta = reader.take("rope_local_base_freq", 1e4 if model_type == "gemma3_text" else theta)
    scaling = reader.take("rope_scaling", None)
    given = reader.take("rope_parameters", None)
    kinds = tuple(dict.fromkeys(layer_types))
    if given is None:
        given = {
            FULL: {"rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_theta": local_theta},
        }
    elif not set(given) & {FULL, SLIDING}:
        given = dict.fromkeys(kinds, given)
    return tuple((kind, _rope(kind, given.get(kind) or {})) for kind in kinds)


def _rope(kind: str, raw: Mapping[str, Any]) -> RopeParameters:
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ConfigError(f"rope_type of {kind}: expected default or linear, got {rope_type!r}")
    if "rope_theta" not in raw:
        raise ConfigError(f"rope_parameters of {kind}: expected rope_theta, got {sorted(raw)}")
    factor = raw.get("factor", 1.0) if rope_type == "linear" else 1.0
    return RopeParameters(rope_theta=float(raw["rope_theta"]), factor=float(factor))


def _softcap(reader: _Reader, key: str, model_type: str) -> float | None:
    """Return a softcap; Gemma 3 configs may set one that the reference code never applies."""
    default = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key]
    value = reader.take(key, default if model_type in ("gemma2", "vaultgemma") else None)
    if value is not None and model_type == "gemma":
        raise ConfigError(f"{key}: expected none in a gemma model, got {value}")
    if key == "attn_logit_softcapping" and model_type == "gemma3_text":
        return None
    return None if value is None else float(value)
