"""Reads how a Gemma 3n takes pictures from its `config.json` and its processor's settings.

Facts and defaults follow `models/gemma3n` of transformers 5.23, and what its script
`convert_gemma3n_weights.py` gives the published processor: 768 pixels, bilinear, and colors from 0
to 1 that are not normalized.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import Reader, check_factor, section_of
from beam_gemma.model.mobilenet_v5 import ARCHITECTURES
from beam_gemma.model.vision_config import (
    MAX_TOKEN_ID,
    UNREAD_PROCESSOR_KEYS,
    VisionConfig,
    check_colors,
    check_rescale,
    check_size,
    resample_filter,
)

BEGIN_TOKEN, IMAGE_TOKEN = "<start_of_image>", "<image_soft_token>"
"""Pieces before a picture, and for the whole of it in chat templates."""
IMAGE_TOKEN_ID, END_TOKEN_ID = 262_145, 262_144
"""Ids of a picture's tokens, and of `<end_of_image>` behind them."""
VOCAB_SIZE, VOCAB_OFFSET = 128, 262_144
"""Number and first id of the tokens that pictures have for themselves."""
MAX_VOCAB_SIZE = 1 << 16
UNREAD_KEYS = ("do_pooling", "label_names", "num_classes", "initializer_range")
"""Keys of `vision_config` that change nothing: those of timm's classifiers, which have a pooling
that `Gemma3nModel` never asks for."""
SOUND_KEYS = (
    "dither", "feature_size", "fft_length", "fft_overdrive", "frame_length", "hop_length",
    "input_scale_factor", "max_frequency", "mel_floor", "min_frequency", "padding_side",
    "padding_value", "per_bin_mean", "per_bin_stddev", "preemphasis", "preemphasis_htk_flavor",
    "return_attention_mask", "sampling_rate",
)  # fmt: skip
"""Keys of the processor of sound, which is saved in the same file."""


def gemma3n_vision(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> VisionConfig | None:
    """Read the tower.

    Args:
        raw: Content of `config.json`.
        settings: Settings of the processor of pictures; a key that is missing or `null` has the
            published value.

    Returns:
        None if the model takes no pictures.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    if raw.get("vision_config") is None:
        return None
    section = section_of("vision_config", raw["vision_config"])
    name, epsilon, number, offset = _tower(section)
    built = ARCHITECTURES[name]
    count = built.output_side**2
    Reader(raw).require("vision_soft_tokens_per_image", (count, None))
    end = _whole("eoi_token_id", raw.get("eoi_token_id", END_TOKEN_ID), offset, offset + number - 1)
    token_id = raw.get("image_token_id", IMAGE_TOKEN_ID)
    return VisionConfig(
        hidden_size=built.hidden_size,
        intermediate_size=built.hidden_size,
        num_hidden_layers=built.num_blocks,
        num_attention_heads=1,
        image_size=built.image_size,
        patch_size=built.fused_stride,
        layer_norm_eps=epsilon,
        projector="mobilenet",
        num_image_tokens=count + 1,  # the last one is <end_of_image>
        bidirectional="none",
        first_position=0,
        image_token_id=_whole("image_token_id", token_id, 0, MAX_TOKEN_ID),
        begin_token=BEGIN_TOKEN,
        end_token=None,
        image_token=IMAGE_TOKEN,
        architecture=name,
        image_vocab_size=number,
        end_token_row=end - offset,
        **_pixels(settings, built.image_size, count),
    )


def _tower(section: Mapping[str, Any]) -> tuple[str, float, int, int]:
    """Read `vision_config`.

    Returns:
        The name of the architecture, the epsilon of the norms around the projection, and the number
        and the first id of the tokens that pictures have for themselves.
    """
    reader = Reader(section)
    reader.require("model_type", ("gemma3n_vision",))
    name = reader.take("architecture", "mobilenetv5_300m_enc")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"architecture: expected {' or '.join(ARCHITECTURES)}, got {reprlib.repr(name)}"
        )
    reader.require("hidden_size", (ARCHITECTURES[name].hidden_size,))
    reader.require("model_args", (None, {}))
    epsilon = check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6))
    number = _whole("vocab_size", reader.take("vocab_size", VOCAB_SIZE), 1, MAX_VOCAB_SIZE)
    offset = _whole("vocab_offset", reader.take("vocab_offset", VOCAB_OFFSET), 0, MAX_TOKEN_ID)
    for key in UNREAD_KEYS:
        reader.take(key, None)
    reader.finish()
    return name, epsilon, number, offset


def _whole(key: str, value: Any, least: int, most: int) -> int:
    """Return a whole number within bounds."""
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(
            f"{key}: expected a whole number from {least:,} to {most:,}, got {reprlib.repr(value)}"
        )
    return value


def _pixels(settings: Mapping[str, Any], image_size: int, num_tokens: int) -> dict[str, Any]:
    """Read what makes pixels of a picture."""
    given = {key: value for key, value in settings.items() if value is not None}
    expected: dict[str, Any] = {
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale"), True),
        "do_center_crop": False,
        "do_pad": False,
        "image_seq_length": num_tokens,
    }
    read = ("do_normalize", "image_mean", "image_std", "resample", "rescale_factor", "size")
    known = {*expected, *read, *UNREAD_PROCESSOR_KEYS, *SOUND_KEYS}
    for key in sorted(set(given) - known):
        raise ConfigError(
            f"preprocessor_config.json: the key {reprlib.repr(key)} is not known"
            f"{nearest(key, known)}"
        )
    for key, value in expected.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{key}: expected {value}, got {reprlib.repr(given[key])}")
    check_colors(given)
    check_size(given.get("size"), image_size)
    check_rescale(given.get("rescale_factor", 1 / 255))
    return {
        "resample": resample_filter(given.get("resample", 2)),
        "image_mean": (0.0, 0.0, 0.0),
        "image_std": (1.0, 1.0, 1.0),
    }
