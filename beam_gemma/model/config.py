"""Architecture of a checkpoint, with the field names of Hugging Face's `config.json`.

A `GemmaConfig` describes one stack of layers. It covers the text models of Gemma 1, 2 and 3 and
their derivatives, one block with switches; each half of a T5Gemma or a T5Gemma 2; and the recurrent
blocks of RecurrentGemma. `GemmaConfig.from_hf` reads the first; `encoder_decoder_config.py` and
`recurrent_config.py` read the others. Facts and defaults follow the configuration classes of
transformers 5.23 (`models/*gemma*/configuration_*.py`).
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import (
    FACTORS,
    MAX_SIZES,
    OPTIONAL_FACTORS,
    OPTIONAL_SIZES,
    Reader,
    check_factor,
    check_size,
    section_of,
)

FULL = "full_attention"
SLIDING = "sliding_attention"
RECURRENT = "linear_attention"
"""The layer type of a recurrent block, as transformers calls it."""
DECODERS = ("gemma", "gemma2", "gemma3_text", "vaultgemma", "recurrent_gemma")
ENCODER_DECODERS = ("t5gemma", "t5gemma2")
MODEL_TYPES = (*DECODERS, *ENCODER_DECODERS)

PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Keys of the pattern of layers: the one that Gemma 3 reads, and a copy beside `layer_types`."""
ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "factor",
                       "original_max_position_embeddings"})  # fmt: skip
"""Keys of rotary parameters that are read, or that linear scaling does not use."""


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
    """`full_attention`, `sliding_attention` or `linear_attention`, a recurrent block, for each
    layer."""
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
    """True if tokens also attend to later ones, as in EmbeddingGemma, which is no decoder, and in
    the encoder of an encoder-decoder."""
    cross_attention_hidden_size: int | None = None
    """Width of the encoder whose states a decoder attends to; None if it has no encoder."""
    lru_width: int | None = None
    """Channels of a recurrent block; None for a model without such blocks."""
    conv1d_width: int | None = None
    """Tokens that the convolution of a recurrent block spans, its own included."""
    partial_rotary_factor: float = 1.0
    """Share of a head's channels, the first ones, that the rotary embedding turns."""
    eoi_token_id: int | None = None
    """Token id whose embedding is a tensor of its own, not scaled; None in models without one. In
    T5Gemma 2 it is the end of a picture."""

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
        known = {SLIDING, RECURRENT} if self.model_type == "recurrent_gemma" else {FULL, SLIDING}
        if unknown := set(self.layer_types) - known:
            raise ConfigError(
                f"layer_types: expected {' or '.join(sorted(known))}, got "
                f"{reprlib.repr(sorted(unknown))}"
            )
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ConfigError("sliding_window: expected a number of tokens, got none")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        if not self.tie_word_embeddings and self.model_type != "t5gemma":
            raise ConfigError("tie_word_embeddings: expected true for a Gemma model, got false")
        if self.use_bidirectional_attention:
            self._check_two_sided()
        self._check_recurrent()

    def _check_numbers(self) -> None:
        for name in MAX_SIZES:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL_SIZES:
                check_size(name, value)
        for name in FACTORS:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL_FACTORS:
                check_factor(name, value)

    def _check_two_sided(self) -> None:
        if self.model_type in ENCODER_DECODERS and not self.reads_source:
            return
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

    def _check_recurrent(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise ConfigError(
                f"partial_rotary_factor: expected a share of head_dim ({self.head_dim}) that is an "
                f"even number of channels, got {self.partial_rotary_factor}"
            )
        if self.model_type != "recurrent_gemma":
            return
        if self.lru_width is None or self.lru_width % self.num_attention_heads:
            raise ConfigError(
                f"lru_width: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.lru_width}"
            )
        if self.conv1d_width is None or self.conv1d_width < 2:
            raise ConfigError(f"conv1d_width: expected at least 2, got {self.conv1d_width}")

    @property
    def attention_scale(self) -> float:
        """Factor applied to query-key products."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def has_qk_norm(self) -> bool:
        """True if queries and keys are normalized per head before the rotation."""
        return self.model_type in ("gemma3_text", "t5gemma2")

    @property
    def has_post_norms(self) -> bool:
        """True if attention and feed-forward outputs are normalized before the residual sum."""
        return self.model_type in ("gemma2", "gemma3_text", *ENCODER_DECODERS)

    @property
    def is_recurrent(self) -> bool:
        """True if some layers are recurrent blocks."""
        return RECURRENT in self.layer_types

    @property
    def reads_source(self) -> bool:
        """True if the decoder attends to an encoder's states of a source."""
        return self.cross_attention_hidden_size is not None

    @property
    def merges_attention(self) -> bool:
        """True if one attention reads the source and the decoder's own tokens."""
        return self.reads_source and self.model_type == "t5gemma2"

    @property
    def groups(self) -> tuple[str, ...]:
        """The types of the attention layers in use, in the order of their first layer."""
        return tuple(kind for kind in dict.fromkeys(self.layer_types) if kind != RECURRENT)

    def window(self, layer_type: str) -> int | None:
        """Return the number of tokens visible to a query in layers of this type, or None for all.

        With `use_bidirectional_attention`, a query sees tokens on both sides; how many, the graph
        decides by the model (`export.modules.encoder.reach`).
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
