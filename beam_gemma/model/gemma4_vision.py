"""Reads how a Gemma 4 takes pictures from its `config.json` and its processor's settings.

An EmbeddingGemma 2 has the tower and the processor of a Gemma 4, and attention in both directions
everywhere, so that no tokens of pictures need it on their own. Facts and defaults follow
`models/gemma4`, `models/gemma4_unified`, `models/embedding_gemma2` and `Gemma4ImageProcessorPil` of
transformers 5.23.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import Reader, check_factor, section_of
from beam_gemma.model.vision_config import (
    IMAGE_TOKENS,
    MAX_TOKEN_ID,
    MAX_TOWER_SIZES,
    UNREAD_PROCESSOR_KEYS,
    Bidirectional,
    VisionConfig,
    check_colors,
    check_rescale,
    resample_filter,
)

BEGIN_TOKEN, IMAGE_TOKEN, END_TOKEN = "<|image>", "<|image|>", "<image|>"
"""Pieces before a picture, for each of its tokens, and behind it."""
IMAGE_TOKEN_ID = 258_880
TOWER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "position_embedding_size",
)  # fmt: skip
TOWER_DEFAULTS = (768, 3072, 16, 12, 10240)
UNREAD_KEYS = ("max_position_embeddings", "initializer_range", "attention_dropout",
               "output_proj_dims", "num_soft_tokens", "default_output_length")  # fmt: skip


def gemma4_vision(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> VisionConfig | None:
    """Read the tower, or what takes its place.

    Args:
        raw: Content of `config.json`.
        settings: Settings of the processor of pictures; a key that is missing or `null` has its
            default.

    Returns:
        None if the model takes no pictures.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    if raw.get("vision_config") is None:
        return None
    section = section_of("vision_config", raw["vision_config"])
    has_tower = raw.get("model_type") != "gemma4_unified"
    values = _tower(section) if has_tower else _squares(section)
    token_id = raw.get("image_token_id", IMAGE_TOKEN_ID)
    if type(token_id) is not int or not 0 <= token_id < MAX_TOKEN_ID:
        raise ConfigError(f"image_token_id: expected a token id, got {reprlib.repr(token_id)}")
    return VisionConfig(
        **values,
        image_size=0,
        bidirectional=_bidirectional(raw),
        first_position=0,
        image_token_id=token_id,
        begin_token=BEGIN_TOKEN,
        end_token=END_TOKEN,
        image_token=IMAGE_TOKEN,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        **_pixels(settings, values),
    )


def _bidirectional(raw: Mapping[str, Any]) -> Bidirectional:
    """Return which tokens of pictures attend to later ones."""
    default = "vision" if raw["model_type"] == "gemma4_unified" else None
    text = section_of("text_config", raw.get("text_config") or {})
    return "local" if text.get("use_bidirectional_attention", default) == "vision" else "none"


def _tower(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `vision_config` of a model with a tower."""
    reader = Reader(section)
    reader.require("model_type", ("gemma4_vision",))
    reader.require("hidden_activation", ("gelu_pytorch_tanh", None))
    reader.require("attention_bias", (False, None))
    values = {
        key: _size(reader, key, default)
        for key, default in zip(TOWER_KEYS, TOWER_DEFAULTS, strict=True)
    }
    heads, width = values["num_attention_heads"], values["hidden_size"]
    reader.require("num_key_value_heads", (heads, None))
    reader.require("head_dim", (width // heads, None))
    if width % heads or width // heads % 4:
        raise ConfigError(
            f"vision_config: expected heads of a multiple of 4 channels, got {width} channels and "
            f"{heads} heads"
        )
    rope = reader.section("rope_parameters") or {}
    if rope.get("rope_theta", 100.0) != 100.0 or rope.get("rope_type", "axial") != "axial":
        raise ConfigError(
            f"vision_config: expected axial rope_parameters with a rope_theta of 100, got "
            f"{reprlib.repr(rope)}"
        )
    found = {
        **values,
        **_patches(reader),
        "projector": "tower",
        "standardize": reader.switch("standardize", default=False),
        "use_clipped_linears": reader.switch("use_clipped_linears", default=False),
    }
    for key in UNREAD_KEYS:
        reader.take(key, None)
    reader.finish()
    return found


def _squares(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `vision_config` of a model without a tower."""
    reader = Reader(section)
    reader.require("model_type", ("gemma4_unified_vision",))
    width = _size(reader, "mm_embed_dim", 3840)
    reader.require("output_proj_dims", (width,))
    found = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
        "position_embedding_size": _size(reader, "mm_posemb_size", 1120),
        **_patches(reader),
        "projector": "patches",
    }
    reader.require("model_patch_size", (found["patch_size"] * found["pooling_kernel_size"], None))
    for key in UNREAD_KEYS:
        reader.take(key, None)
    reader.finish()
    return found


def _patches(reader: Reader) -> dict[str, Any]:
    return {
        "patch_size": _size(reader, "patch_size", 16),
        "pooling_kernel_size": _size(reader, "pooling_kernel_size", 3),
        "layer_norm_eps": check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6)),
    }


def _size(reader: Reader, key: str, default: int) -> int:
    value, limit = reader.take(key, default), MAX_TOWER_SIZES.get(key, 1 << 17)
    if type(value) is not int or not 1 <= value <= limit:
        raise ConfigError(
            f"vision_config: expected {key} as a whole number from 1 to {limit:,}, got "
            f"{reprlib.repr(value)}"
        )
    return value


def _pixels(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Read what makes pixels of a picture."""
    given = {key: value for key, value in settings.items() if value is not None}
    expected: dict[str, Any] = {
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale"), True),
        "do_center_crop": False,
        "do_pad": False,
        "patch_size": values["patch_size"],
        "pooling_kernel_size": values["pooling_kernel_size"],
        "model_patch_size": values["patch_size"] * values["pooling_kernel_size"],
    }
    read = ("max_soft_tokens", "image_seq_length", "resample", "rescale_factor", "do_normalize",
            "image_mean", "image_std", "size")  # fmt: skip
    known = {*expected, *read, *UNREAD_PROCESSOR_KEYS}
    for key in sorted(set(given) - known):
        raise ConfigError(
            f"processor_config.json: the key {reprlib.repr(key)} is not known{nearest(key, known)}"
        )
    for key, value in expected.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{key}: expected {value}, got {reprlib.repr(given[key])}")
    check_colors(given)
    check_rescale(given.get("rescale_factor", 1 / 255))
    number = given.get("max_soft_tokens", given.get("image_seq_length", 280))
    if type(number) is not int or number not in IMAGE_TOKENS:
        raise ConfigError(
            f"max_soft_tokens: expected one of {', '.join(map(str, IMAGE_TOKENS))}, got "
            f"{reprlib.repr(number)}"
        )
    return {"num_image_tokens": number, "resample": resample_filter(given.get("resample", 3))}
