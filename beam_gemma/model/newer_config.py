"""Reads the text model of a Gemma 3n, a Gemma 4 or an EmbeddingGemma 2 from its `config.json`.

Facts and defaults follow the configuration classes of transformers 5.23 in `models/gemma3n`,
`models/gemma4`, `models/gemma4_unified` and `models/embedding_gemma2`.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import Reader, check_factor, check_size, section_of
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.rope import RopeParameters, read_rope

TEXT_TYPES = {
    "gemma3n_text": "gemma3n_text",
    "gemma4_text": "gemma4_text",
    "gemma4_unified_text": "gemma4_text",
    "embedding_gemma2_text": "embedding_gemma2_text",
}
"""Our model type for each one of a text model's `config.json`."""
OUTER_TYPES = ("gemma3n", "gemma4", "gemma4_unified", "embedding_gemma2")
"""Model types of a `config.json` that has its text model in `text_config`."""
LAYERS_PER_FULL = {"gemma3n_text": 5, "gemma4_text": 6, "embedding_gemma2_text": 6}
"""After how many layers a full one comes, where `layer_types` does not say it."""
SPARSE_LAYERS, SPARSITY = 10, 0.95
"""Layers of a Gemma 3n, the first ones, whose gates are cut, and the share of them that is."""


def is_newer(raw: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is one that `newer_config` reads."""
    return raw.get("model_type") in (*TEXT_TYPES, *OUTER_TYPES)


def newer_config(raw: Mapping[str, Any]) -> GemmaConfig:
    """Read the text model of a `config.json`, which may be its `text_config`.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    outer = raw.get("model_type")
    if outer in OUTER_TYPES:
        text = section_of("text_config", raw.get("text_config"))
        raw = {"model_type": f"{outer}_text", **text}
    reader = Reader(raw)
    name = reader.take("model_type")
    if name not in TEXT_TYPES or (outer in OUTER_TYPES and name != f"{outer}_text"):
        raise ConfigError(
            f"model_type: expected {f'{outer}_text' if outer in OUTER_TYPES else TEXT_TYPES}, got "
            f"{reprlib.repr(name)}"
        )
    return _config(reader, TEXT_TYPES[name], name)


def _config(reader: Reader, model_type: str, name: str) -> GemmaConfig:
    """Read all keys of a text model.

    Args:
        reader: The keys.
        model_type: Our name of its type.
        name: The name of its type in the file.
    """
    reader.require("hidden_activation", ("gelu_pytorch_tanh", None))
    reader.require("attention_bias", (False, None))
    if model_type == "embedding_gemma2_text":
        reader.take("embedding_dim", None)  # width of the embeddings, which is not the stack's
    num_layers = reader.size("num_hidden_layers")
    layer_types = _layer_types(reader, model_type, num_layers)
    shared = _count(reader, "num_kv_shared_layers", 15 if model_type == "gemma3n_text" else 0)
    widths = _widths(reader, num_layers, shared)
    config = GemmaConfig(
        model_type=model_type,
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        intermediate_size=max(widths),
        intermediate_sizes=() if len({*widths}) == 1 else widths,
        num_hidden_layers=num_layers,
        num_attention_heads=reader.size("num_attention_heads"),
        num_key_value_heads=reader.size("num_key_value_heads"),
        head_dim=reader.size("head_dim", 256),
        max_position_embeddings=reader.size("max_position_embeddings"),
        layer_types=layer_types,
        sliding_window=reader.size("sliding_window", 1024 if "unified" in name else 512),
        rope_parameters=_rope_parameters(reader, model_type, layer_types),
        query_pre_attn_scalar=1.0,
        final_logit_softcapping=_softcap(reader, model_type),
        rms_norm_eps=check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6)),
        tie_word_embeddings=reader.switch("tie_word_embeddings", default=True),
        use_bidirectional_attention=_is_two_sided(reader, model_type),
        num_kv_shared_layers=shared,
        **_of_full_layers(reader, model_type, layer_types),
        **_per_layer_inputs(reader, model_type, name),
        **(_altup(reader, num_layers) if model_type == "gemma3n_text" else {}),
        **(_experts(reader, name) if model_type == "gemma4_text" else {}),
    )
    reader.finish()
    return config


def _layer_types(reader: Reader, model_type: str, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer; the last one of a Gemma 4 is full whatever the file says."""
    period = LAYERS_PER_FULL[model_type]
    if model_type == "embedding_gemma2_text":
        period = reader.take("sliding_window_pattern", period)
        if type(period) is not int or period < 1:
            raise ConfigError(
                f"sliding_window_pattern: expected a whole number above 0, got "
                f"{reprlib.repr(period)}"
            )
    given = reader.take("layer_types", None)
    if given is None:
        given = [FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers)]
    if not isinstance(given, list | tuple) or not all(k in (FULL, SLIDING) for k in given):
        raise ConfigError(
            f"layer_types: expected a list of {FULL} and {SLIDING}, got {reprlib.repr(given)}"
        )
    return tuple(given) if model_type == "gemma3n_text" else (*given[:-1], FULL)


def _count(reader: Reader, key: str, default: int) -> int:
    """Take a number of layers, which may be 0."""
    value = reader.take(key, default)
    return 0 if type(value) is int and value == 0 else check_size("num_hidden_layers", value)


def _widths(reader: Reader, num_layers: int, shared: int) -> tuple[int, ...]:
    """Return the width of each layer's feed-forward.

    Gemma 3n may list them; in some Gemma 4, those of layers without keys and values are doubled.
    """
    given = reader.take("intermediate_size")
    if not isinstance(given, list | tuple):
        given = [given] * num_layers
    if len(given) != num_layers:
        raise ConfigError(
            f"intermediate_size: expected one number, or {num_layers} (num_hidden_layers), got "
            f"{len(given)}"
        )
    widths = [check_size("intermediate_size", width) for width in given]
    if reader.switch("use_double_wide_mlp", default=False):
        own = num_layers - shared
        widths = [width * (2 if i >= own else 1) for i, width in enumerate(widths)]
    return tuple(widths)


def _rope_parameters(
    reader: Reader, model_type: str, layer_types: tuple[str, ...]
) -> tuple[tuple[str, RopeParameters], ...]:
    """Return the rotary parameters of each layer type in use."""
    proportion = 0.25 if model_type == "gemma4_text" else 1.0
    kind = "proportional" if model_type == "gemma4_text" else "default"
    default = {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": kind, "partial_rotary_factor": proportion, "rope_theta": 1e6},
    }
    given = reader.section("rope_parameters")
    if model_type == "gemma3n_text":  # older files have theta beside it
        theta = {SLIDING: reader.take("rope_local_base_freq", 1e4),
                 FULL: reader.take("rope_theta", 1e6)}  # fmt: skip
        reader.require("rope_scaling", (None,))
        rope = given or {}
        given = {k: {"rope_theta": theta[k], **section_of(k, rope.get(k) or {})} for k in theta}
    given = default if given is None else given
    if set(given) - {FULL, SLIDING}:
        raise ConfigError(
            f"rope_parameters: expected {FULL} and {SLIDING}, got {reprlib.repr(sorted(given))}"
        )
    types = ("default", "linear", "proportional")
    kinds = tuple(dict.fromkeys(layer_types))
    return tuple((k, read_rope(k, section_of(k, given.get(k) or {}), types)) for k in kinds)


def _softcap(reader: Reader, model_type: str) -> float | None:
    """Return the cap of the logits, which is part of the class in Gemma 3n alone."""
    if model_type == "embedding_gemma2_text":
        return None
    default = 30.0 if model_type == "gemma3n_text" else None
    value = reader.take("final_logit_softcapping", default)
    return None if value is None else check_factor("final_logit_softcapping", value)


def _is_two_sided(reader: Reader, model_type: str) -> bool:
    """Return whether all tokens attend to later ones.

    The value `vision` is about pictures alone (`VisionConfig`).
    """
    if model_type == "gemma4_text":
        reader.require("use_bidirectional_attention", (None, "vision", False))
    elif model_type == "gemma3n_text":
        reader.require("use_bidirectional_attention", (None, False))
    return model_type == "embedding_gemma2_text"


def _of_full_layers(
    reader: Reader, model_type: str, layer_types: tuple[str, ...]
) -> dict[str, Any]:
    """Return what full layers have of their own: the number and size of their heads."""
    if model_type == "gemma3n_text":
        return {}
    default = 1 if model_type == "embedding_gemma2_text" else None
    size = reader.size("global_head_dim", None)
    heads = reader.size("num_global_key_value_heads", None)
    shares = model_type == "gemma4_text" and reader.switch("attention_k_eq_v", default=False)
    saved = reader.section("per_layer_config")
    if saved is None:
        # transformers reads the number of heads of a Gemma 4 only together with this switch
        is_read = shares or model_type != "gemma4_text"
        size, heads = size or 512, (heads or default) if is_read else None
    elif size is None and heads is None:
        size, heads = _saved_heads(saved, layer_types)
    else:
        raise ConfigError(
            "global_head_dim: expected none beside per_layer_config, which says the same, got both"
        )
    return {
        "global_head_dim": size,
        "num_global_key_value_heads": heads,
        "attention_k_eq_v": shares,
    }


def _saved_heads(
    saved: Mapping[str, Any], layer_types: tuple[str, ...]
) -> tuple[int | None, int | None]:
    """Return the size and number of the heads of full layers from `per_layer_config`.

    transformers writes what differs from `head_dim` and `num_key_value_heads` by layer number.
    """
    full = {i for i, kind in enumerate(layer_types) if kind == FULL}
    layers = {int(key) for key in map(str, saved) if key.isdecimal()}
    values = [section_of("per_layer_config", value) for value in saved.values()]
    known = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    if layers != full or any(v != values[0] or {*v} - {*known} for v in values):
        raise ConfigError(
            f"per_layer_config: expected the same {' and '.join(known)} for each full layer and "
            f"nothing else, got {reprlib.repr(saved)}"
        )
    size, heads = (
        None if values[0].get(key) is None else check_size(name, values[0][key])
        for key, name in known.items()
    )
    return size, heads


def _per_layer_inputs(reader: Reader, model_type: str, name: str) -> dict[str, Any]:
    """Return the sizes of per-layer embeddings; a width of 0 stands for none.

    The class of the type `gemma4_unified_text` has none, which its files say with other keys.
    """
    if name == "gemma4_unified_text":
        reader.require("hidden_size_per_layer_input", (0, None))
        reader.take("vocab_size_per_layer_input", None)
        return {}
    rows = None
    if model_type != "embedding_gemma2_text":
        rows = reader.size("vocab_size_per_layer_input", 262144)
    key = "hidden_size_per_layer_input"
    width = reader.take(key, 512 if model_type == "embedding_gemma2_text" else 256)
    if type(width) is int and width == 0:
        return {}
    return {key: check_size(key, width), "vocab_size_per_layer_input": rows}


def _altup(reader: Reader, num_layers: int) -> dict[str, Any]:
    """Return what Gemma 3n alone has: alternating updates, residuals of low rank, sparse gates."""
    check_factor("altup_coef_clip", reader.take("altup_coef_clip", 120.0))  # read in training alone
    inputs = reader.size("altup_num_inputs", 4)
    active = reader.take("altup_active_idx", 0)
    if type(active) is not int or not 0 <= active < inputs:
        raise ConfigError(
            f"altup_active_idx: expected 0 to {inputs - 1}, got {reprlib.repr(active)}"
        )
    return {
        "altup_num_inputs": inputs,
        "altup_active_idx": active,
        "altup_correct_scale": reader.switch("altup_correct_scale", default=True),
        "laurel_rank": reader.size("laurel_rank", 64),
        "activation_sparsity_pattern": _sparsity(reader, num_layers),
    }


def _sparsity(reader: Reader, num_layers: int) -> tuple[float, ...]:
    """Return the share of gates that each layer cuts."""
    sparse = SPARSE_LAYERS if num_layers > SPARSE_LAYERS else 0
    given = reader.take("activation_sparsity_pattern", None)
    if given is None:
        given = [SPARSITY] * sparse + [0.0] * (num_layers - sparse)
    if not isinstance(given, list | tuple) or not all(
        type(share) in (int, float) and 0 <= share < 1 for share in given
    ):
        raise ConfigError(
            f"activation_sparsity_pattern: expected a list of shares from 0 to below 1, got "
            f"{reprlib.repr(given)}"
        )
    return tuple(float(share) for share in given)


def _experts(reader: Reader, name: str) -> dict[str, Any]:
    """Return the sizes of a mixture of experts; files without one may have the keys as null."""
    if name == "gemma4_unified_text":  # whose class has no experts
        reader.require("enable_moe_block", (False, None))
    has_experts = reader.switch("enable_moe_block", default=False)
    values = {
        key: reader.size(key, None)
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size")
    }
    if not has_experts:
        return {}
    for key, value in values.items():
        if value is None:
            raise ConfigError(f"{key}: expected a number beside enable_moe_block, got none")
    return values
