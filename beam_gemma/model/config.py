"""Architecture of a checkpoint, with the field names of Hugging Face's `config.json`.

A `GemmaConfig` describes one stack of layers. It covers the text models of Gemma 1, 2 and 3 and
their derivatives, one block with switches; those of Gemma 3n, Gemma 4 and EmbeddingGemma 2, whose
layers differ in size; each half of a T5Gemma or a T5Gemma 2; and the recurrent blocks of
RecurrentGemma. `GemmaConfig.from_hf` reads the first; `newer_config.py`, `recurrent_config.py` and
`encoder_decoder_config.py` read the others. Facts and defaults follow the configuration classes of
transformers 5.23 (`models/*gemma*/configuration_*.py`).
"""

import math
import reprlib
from collections.abc import Mapping
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
)
from beam_gemma.model.layer_types import FULL, RECURRENT, SLIDING, read_layer_types
from beam_gemma.model.rope import RopeParameters, read_rope_parameters

NEWER = ("gemma3n_text", "gemma4_text", "embedding_gemma2_text")
"""Models whose layers have per-layer embeddings, sizes by their type, or caches of other layers."""
DECODERS = ("gemma", "gemma2", "gemma3_text", "vaultgemma", "recurrent_gemma", *NEWER)
ENCODER_DECODERS = ("t5gemma", "t5gemma2")
MODEL_TYPES = (*DECODERS, *ENCODER_DECODERS)


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
    global_head_dim: int | None = None
    """Head size of full layers, if it differs from `head_dim`."""
    num_global_key_value_heads: int | None = None
    """Key-value heads of full layers, if they differ from `num_key_value_heads`."""
    attention_k_eq_v: bool = False
    """True if full layers make values of the projection that makes their keys."""
    num_kv_shared_layers: int = 0
    """Layers at the end that have no keys and values, and read those of `producer`."""
    intermediate_sizes: tuple[int, ...] = ()
    """Width of the feed-forward of each layer; empty if all have `intermediate_size`."""
    hidden_size_per_layer_input: int | None = None
    """Width of the per-layer embeddings; None for a model without them."""
    vocab_size_per_layer_input: int | None = None
    """Rows of the table of per-layer embeddings; None if there is none, as in EmbeddingGemma 2, or
    no per-layer embeddings."""
    altup_num_inputs: int | None = None
    """Copies of the residual stream that AltUp keeps; None for a model with one stream."""
    altup_active_idx: int = 0
    """The copy that attention and feed-forward compute with."""
    altup_correct_scale: bool = True
    """True if the active copy is scaled before it gates the per-layer embeddings."""
    laurel_rank: int | None = None
    """Rank of the learned augmented residual; None for a model without it."""
    activation_sparsity_pattern: tuple[float, ...] = ()
    """Share of each layer's feed-forward gates that are cut to zero; empty if none are."""
    num_experts: int | None = None
    """Experts of each layer; None for a model without experts."""
    top_k_experts: int | None = None
    """Experts that a token takes."""
    moe_intermediate_size: int | None = None
    """Width of an expert's feed-forward."""
    suppress_tokens: tuple[int, ...] = ()
    """Token ids that the model never writes, as `generation_config.json` lists them."""

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
        if any(not 0 <= token_id < self.vocab_size for token_id in self.suppress_tokens):
            raise ConfigError(
                f"suppress_tokens: expected token ids below {self.vocab_size:,} (vocab_size), got "
                f"{reprlib.repr(self.suppress_tokens)}"
            )
        self._check_layers()
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
        if self.model_type == "embedding_gemma2_text":
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
        widths = {self.rotary_dim_of(group) for group in self.groups}
        if not 0 < self.partial_rotary_factor <= 1 or any(w % 2 or not w for w in widths):
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

    def _check_layers(self) -> None:
        for name in ("intermediate_sizes", "activation_sparsity_pattern"):
            if (values := getattr(self, name)) and len(values) != self.num_hidden_layers:
                raise ConfigError(
                    f"{name}: expected {self.num_hidden_layers} entries (num_hidden_layers), got "
                    f"{len(values)}"
                )
        own = self.layer_types[: self.first_shared_layer]
        if not 0 <= self.num_kv_shared_layers < self.num_hidden_layers or {*own} != {
            *self.layer_types
        }:
            raise ConfigError(
                "num_kv_shared_layers: expected fewer than num_hidden_layers "
                f"({self.num_hidden_layers}), with a layer of each type before them, got "
                f"{self.num_kv_shared_layers}"
            )
        for group in self.groups:
            heads = self.num_kv_heads_of(group)
            if self.num_attention_heads % heads or self.head_dim_of(group) % 2:
                raise ConfigError(
                    f"{group}: expected key-value heads that divide num_attention_heads "
                    f"({self.num_attention_heads}), and an even head size, got {heads} and "
                    f"{self.head_dim_of(group)}"
                )
        if self.num_experts is not None and not (
            self.moe_intermediate_size and 1 <= (self.top_k_experts or 0) <= self.num_experts
        ):
            raise ConfigError(
                f"top_k_experts: expected 1 to {self.num_experts} (num_experts) and a "
                f"moe_intermediate_size, got {self.top_k_experts} and {self.moe_intermediate_size}"
            )

    @property
    def attention_scale(self) -> float:
        """Factor applied to query-key products."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    def rotary_dim_of(self, layer_type: str) -> int:
        """Return how many channels of a head the rotary embedding of a layer type turns."""
        return int(self.head_dim_of(layer_type) * self.partial_rotary_factor)

    @property
    def has_qk_norm(self) -> bool:
        """True if queries and keys are normalized per head before the rotation."""
        return self.model_type in ("gemma3_text", "t5gemma2", *NEWER)

    @property
    def has_value_norm(self) -> bool:
        """True if values are normalized per head, by a norm without a weight."""
        return self.model_type in NEWER

    @property
    def has_layer_scalar(self) -> bool:
        """True if each layer's output is multiplied by a number of its own."""
        return self.model_type in ("gemma4_text", "embedding_gemma2_text")

    @property
    def norm_offset(self) -> float:
        """Number that a norm of a Hugging Face checkpoint adds to its stored weight."""
        return 0.0 if self.model_type in NEWER else 1.0

    @property
    def has_post_norms(self) -> bool:
        """True if attention and feed-forward outputs are normalized before the residual sum."""
        return self.model_type in ("gemma2", "gemma3_text", *NEWER, *ENCODER_DECODERS)

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

    @property
    def first_shared_layer(self) -> int:
        """Number of the first layer that reads another's keys and values.

        If all layers have their own, it is `num_hidden_layers`.
        """
        return self.num_hidden_layers - self.num_kv_shared_layers

    def producer(self, layer: int) -> int:
        """Return the number of the layer whose keys and values a layer reads.

        This is the layer itself, or the last one of its type that has any.
        """
        kind = self.layer_types[layer]
        return layer if layer < self.first_shared_layer else self.cached_layers_of(kind)[-1]

    def cached_layers_of(self, layer_type: str) -> tuple[int, ...]:
        """Return the indices of the layers of one type that have keys and values of their own."""
        return tuple(i for i in self.layers_of(layer_type) if i < self.first_shared_layer)

    def head_dim_of(self, layer_type: str) -> int:
        """Return the head size of layers of this type."""
        return (self.global_head_dim if layer_type == FULL else None) or self.head_dim

    def num_kv_heads_of(self, layer_type: str) -> int:
        """Return the number of key-value heads of layers of this type."""
        in_full = self.num_global_key_value_heads if layer_type == FULL else None
        return in_full or self.num_key_value_heads

    def intermediate_size_of(self, layer: int) -> int:
        """Return the width of a layer's feed-forward."""
        return self.intermediate_sizes[layer] if self.intermediate_sizes else self.intermediate_size

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
        layer_types = read_layer_types(reader, model_type, num_layers)
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
            rope_parameters=read_rope_parameters(reader, model_type, layer_types),
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


def _softcap(reader: Reader, key: str, model_type: str) -> float | None:
    """Return a softcap; Gemma 3 configs may set one that the reference code never applies."""
    default = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key]
    value = reader.take(key, default if model_type in ("gemma2", "vaultgemma") else None)
    if value is not None and model_type == "gemma":
        raise ConfigError(f"{key}: expected none in a gemma model, got {reprlib.repr(value)}")
    if key == "attn_logit_softcapping" and model_type == "gemma3_text":
        return None
    return None if value is None else check_factor(key, value)
