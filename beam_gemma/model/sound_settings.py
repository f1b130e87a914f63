"""Reads how a model takes sound from its `config.json` and its processor's settings.

Facts and defaults follow the configuration classes and feature extractors of transformers 5.23
(`models/gemma4`, `models/gemma4_unified`, `models/gemma3n`).
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import Reader, check_factor, section_of
from beam_gemma.model.sound_config import MAX_SAMPLES, SUBSAMPLING, MelConfig, SoundConfig
from beam_gemma.model.vision_config import MAX_TOKEN_ID

MAX_TOWER_SIZES = {
    "hidden_size": 1 << 14,
    "output_proj_dims": 1 << 17,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 10,
    "conv_kernel_size": 64,
    "attention_chunk_size": 1 << 10,
    "attention_context_left": 1 << 10,
    "reduction_factor": 64,
    "vocab_size": 1 << 22,
    "audio_embed_dim": 1 << 14,
    "feature_size": 1 << 14,
    "sampling_rate": 192_000,
    "audio_seq_length": 1 << 14,
}
"""Largest sizes that are read: at least 8 times those of any released tower."""
MAX_CHANNELS = 1 << 12
GEMMA4_PIECES: dict[str, Any] = {
    "begin_token": "<|audio>",
    "audio_token": "<|audio|>",
    "end_token": "<audio|>",
}
GEMMA3N_PIECES: dict[str, Any] = {
    "begin_token": "<start_of_audio>",
    "audio_token": "<audio_soft_token>",
    "end_token": None,
}
UNREAD_SETTINGS = (
    "audio_ms_per_token", "auto_map", "feature_extractor_type", "processor_class",
    "return_attention_mask", "return_tensors",
)  # fmt: skip
"""Settings of a feature extractor that change no frame of a clip."""
MEL_SETTINGS = (
    "frame_length_ms", "hop_length_ms", "frame_length", "hop_length", "fft_length",
    "fft_overdrive", "min_frequency", "max_frequency", "preemphasis", "preemphasis_htk_flavor",
    "dither", "input_scale_factor", "mel_floor", "per_bin_mean", "per_bin_stddev",
)  # fmt: skip
FRAME_SETTINGS = ("audio_samples_per_token",)
COMMON_SETTINGS = ("feature_size", "sampling_rate", "padding_value", "padding_side",
                   "audio_seq_length", *UNREAD_SETTINGS)  # fmt: skip
SOUND_SETTINGS = frozenset([*COMMON_SETTINGS, *MEL_SETTINGS, *FRAME_SETTINGS])
"""All settings that feature extractors have."""
GEMMA4_MEL: dict[str, Any] = {
    "frame_length_ms": 20.0, "min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0,
    "fft_overdrive": False, "mel_floor": 1e-3,
}  # fmt: skip
"""Settings of Gemma 4 where its file does not say them."""
GEMMA3N_MEL: dict[str, Any] = {
    "frame_length_ms": 32.0, "min_frequency": 125.0, "max_frequency": 7600.0, "preemphasis": 0.97,
    "fft_overdrive": True, "mel_floor": 1e-5,
}  # fmt: skip
"""Those of Gemma 3n."""


def read_sound_config(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> SoundConfig | None:
    """Read the tower of sound, or what takes its place.

    Args:
        raw: Content of `config.json` of a Gemma 3n, a Gemma 4 or an EmbeddingGemma 2.
        settings: Settings of the feature extractor, with the processor's `audio_seq_length`; a key
            that is missing or `null` has its default.

    Returns:
        None if the model takes no sound.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    if raw.get("audio_config") is None:
        return None
    section = section_of("audio_config", raw["audio_config"])
    given = {key: value for key, value in settings.items() if value is not None}
    if raw.get("model_type") == "gemma4_unified":
        return _frames(raw, section, given)
    if raw.get("model_type") == "gemma3n":
        return _usm(raw, section, given)
    return _conformer(raw, section, given)


def _frames(
    raw: Mapping[str, Any], section: Mapping[str, Any], given: Mapping[str, Any]
) -> SoundConfig:
    """Read a model without a tower, whose tokens are frames of samples."""
    reader = Reader(section)
    reader.require("model_type", ("gemma4_unified_audio",))
    width = _size("audio_embed_dim", reader.take("audio_embed_dim", 640))
    for key in ("hidden_size", "output_proj_dims", "audio_samples_per_token"):
        reader.require(key, (width, None))
    eps = check_factor("rms_norm_eps", reader.take("rms_norm_eps", 1e-6))
    reader.finish()
    _check_settings(given, FRAME_SETTINGS)
    _require(given, "audio_samples_per_token", width, 640)
    _require(given, "feature_size", width, 640)
    return SoundConfig(
        encoder="frames",
        num_features=width,
        sampling_rate=_sampling_rate(given),
        num_audio_tokens=-(-MAX_SAMPLES // width),
        audio_token_id=_token_id(raw, 258_881),
        mel=None,
        hidden_size=width,
        output_size=width,
        rms_norm_eps=eps,
        **GEMMA4_PIECES,
    )


def _conformer(
    raw: Mapping[str, Any], section: Mapping[str, Any], given: Mapping[str, Any]
) -> SoundConfig:
    """Read the tower of a Gemma 4."""
    reader = Reader(section)
    reader.require("model_type", ("gemma4_audio",))
    reader.require("hidden_act", ("silu", None))
    tower = {
        "hidden_size": _size("hidden_size", reader.take("hidden_size", 1024)),
        "output_size": _size("output_proj_dims", reader.take("output_proj_dims", 1536)),
        **_layers(reader, ""),
        "use_clipped_linears": reader.switch("use_clipped_linears", default=True),
        "subsampling_conv_channels": _channels(reader, "subsampling_conv_channels"),
    }
    # Any such number leaves a weight of exactly 0 in float32.
    invalid = reader.take("attention_invalid_logits_value", -1e9)
    if type(invalid) not in (int, float) or not -1e38 < invalid <= -1e4:
        raise ConfigError(
            "attention_invalid_logits_value: expected a number from -1e38 to -1e4, got "
            f"{reprlib.repr(invalid)}"
        )
    reader.finish()
    if tower["attention_context_left"] < 2:
        raise ConfigError(
            "attention_context_left: expected at least 2, so that a token attends to itself, got "
            f"{tower['attention_context_left']}"
        )
    config = SoundConfig(
        encoder="conformer",
        num_audio_tokens=1,
        audio_token_id=_token_id(raw, 258_881),
        **GEMMA4_PIECES,
        **tower,
        **_mel(given, GEMMA4_MEL, is_3n=False),
    )
    return replace(config, num_audio_tokens=config.tokens_of(config.max_samples))


def _usm(
    raw: Mapping[str, Any], section: Mapping[str, Any], given: Mapping[str, Any]
) -> SoundConfig:
    """Read the tower of a Gemma 3n, whose clips have one token more for `<end_of_audio>`."""
    reader = Reader(section)
    reader.require("model_type", ("gemma3n_audio",))
    for name, value in (("kernel", 3), ("stride", 2)):
        pair = reader.take(f"sscp_conv_{name}_size", [[value] * 2] * SUBSAMPLING)
        if _as_lists(pair) != [[value] * 2] * SUBSAMPLING:
            raise ConfigError(
                f"sscp_conv_{name}_size: expected {[[value] * 2] * SUBSAMPLING}, got "
                f"{reprlib.repr(pair)}"
            )
    width = _size("hidden_size", reader.take("hidden_size", 1536))
    offset = _offset(reader.take("vocab_offset", 262_272))
    tower = {
        "hidden_size": width,
        "output_size": width,
        **_layers(reader, "conf_"),
        "reduction_factor": _size("reduction_factor", reader.take("conf_reduction_factor", 4)),
        "vocab_size": _size("vocab_size", reader.take("vocab_size", 128)),
        "subsampling_conv_channels": _channels(reader, "sscp_conv_channel_size"),
        "group_norm_eps": check_factor(
            "sscp_conv_group_norm_eps", reader.take("sscp_conv_group_norm_eps", 1e-3)
        ),
    }
    mel = _mel(given, GEMMA3N_MEL, is_3n=True)
    reader.require("input_feat_size", (mel["num_features"],))
    reader.finish()
    _check_vocabulary(raw, offset, tower["vocab_size"])
    number = _size("audio_seq_length", given.get("audio_seq_length", 188))
    _require(raw, "audio_soft_tokens_per_image", number, 188)
    config = SoundConfig(
        encoder="usm",
        num_audio_tokens=number + 1,
        audio_token_id=_token_id(raw, 262_273),
        **GEMMA3N_PIECES,
        **tower,
        **mel,
    )
    if (most := config.num_tower_tokens(config.num_frames_of(config.max_samples))) > number:
        raise ConfigError(
            f"audio_seq_length: expected at least {most}, the tokens of {config.max_samples:,} "
            f"samples, got {number}"
        )
    return config


def _check_vocabulary(raw: Mapping[str, Any], offset: int, vocab_size: int) -> None:
    """Check that the end of a clip and its filling have embeddings in the projector's table.

    The first id of sound ends a clip, and the last one, which is also the text model's last, fills
    it up.
    """
    text = section_of("text_config", raw.get("text_config") or {})
    _require(raw, "eoa_token_id", offset, 262_272)
    _require(text, "vocab_size", offset + vocab_size, 262_400)


def _layers(reader: Reader, prefix: str) -> dict[str, Any]:
    """Read what the layers of both towers have, whose keys have a prefix in Gemma 3n."""
    defaults = {
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "conv_kernel_size": 5,
        "attention_chunk_size": 12,
        "attention_context_left": 13,
    }
    sizes = {key: _size(key, reader.take(prefix + key, n)) for key, n in defaults.items()}
    right = reader.take(f"{prefix}attention_context_right", 0)
    if type(right) is not int or not 0 <= right <= MAX_TOWER_SIZES["attention_context_left"]:
        raise ConfigError(
            f"{prefix}attention_context_right: expected a whole number from 0 to "
            f"{MAX_TOWER_SIZES['attention_context_left']:,}, got {reprlib.repr(right)}"
        )
    factors = {"attention_logit_cap": 50.0, "residual_weight": 0.5}
    own = {"gradient_clipping": 1e10, "rms_norm_eps": 1e-6}
    return {
        **sizes,
        "attention_context_right": right,
        **{key: check_factor(prefix + key, reader.take(prefix + key, x))
           for key, x in factors.items()},
        **{key: check_factor(key, reader.take(key, x)) for key, x in own.items()},
    }  # fmt: skip


def _channels(reader: Reader, key: str) -> tuple[int, ...]:
    channels = reader.take(key, [128, 32])
    is_pair = isinstance(channels, list | tuple) and len(channels) == SUBSAMPLING
    if not is_pair or not all(type(n) is int and 1 <= n <= MAX_CHANNELS for n in channels):
        raise ConfigError(
            f"{key}: expected {SUBSAMPLING} whole numbers from 1 to {MAX_CHANNELS:,}, got "
            f"{reprlib.repr(channels)}"
        )
    return tuple(channels)


def _mel(given: Mapping[str, Any], defaults: Mapping[str, Any], *, is_3n: bool) -> dict[str, Any]:
    """Read how samples become frames of mel bins, as fields of a `SoundConfig`."""
    _check_settings(given, MEL_SETTINGS)
    values = {"hop_length_ms": 10.0, "preemphasis_htk_flavor": True, **defaults, **given}
    rate, bins = _sampling_rate(given), _size("feature_size", given.get("feature_size", 128))
    frame, hop = (_samples(values, f"{name}_length_ms", rate) for name in ("frame", "hop"))
    fft = 2 ** math.ceil(math.log2(frame)) * (2 if _switch(values, "fft_overdrive") else 1)
    # Saved files have these copies, which the reference computes anew.
    for key, number in (("frame_length", frame), ("hop_length", hop), ("fft_length", fft)):
        _require(given, key, number, number)
    low, high = (_number(values, f"{end}_frequency", 0.0, rate / 2) for end in ("min", "max"))
    if low >= high:
        raise ConfigError(f"min_frequency: expected less than {high:g}, got {low:g}")
    mel = MelConfig(
        frame_length=frame,
        hop_length=hop,
        fft_length=fft,
        min_frequency=low,
        max_frequency=high,
        preemphasis=_number(values, "preemphasis", 0.0, 1.0),
        preemphasis_htk_flavor=_switch(values, "preemphasis_htk_flavor"),
        mel_floor=check_factor("mel_floor", values["mel_floor"]),
        adds_floor=not is_3n,
        pads_left=0 if is_3n else frame // 2,
        input_scale_factor=check_factor(
            "input_scale_factor", values.get("input_scale_factor", 1.0)
        ),
        per_bin_mean=_per_bin(values, "per_bin_mean", bins),
        per_bin_stddev=_per_bin(values, "per_bin_stddev", bins),
    )
    return {"mel": mel, "num_features": bins, "sampling_rate": rate}


def _check_settings(given: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Check that each setting is known, and that none pads or changes a clip in another way."""
    known = {*COMMON_SETTINGS, *own}
    for key in sorted(set(given) - known):
        raise ConfigError(
            f"feature_extractor: the key {reprlib.repr(key)} is not known{nearest(key, known)}"
        )
    for key, value in (("dither", 0), ("padding_value", 0), ("padding_side", "right")):
        _require(given, key, value, value)


def _require(given: Mapping[str, Any], key: str, value: Any, default: Any) -> None:
    """Check that a key has a value; where it is missing, its default stands for it."""
    found = given.get(key)
    found = default if found is None else found
    if found != value or isinstance(found, bool):
        raise ConfigError(f"{key}: expected {value}, got {reprlib.repr(found)}")


def _size(key: str, value: Any) -> int:
    limit = MAX_TOWER_SIZES[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise ConfigError(
            f"{key}: expected a whole number from 1 to {limit:,} for sound, got "
            f"{reprlib.repr(value)}"
        )
    return value


def _sampling_rate(given: Mapping[str, Any]) -> int:
    return _size("sampling_rate", given.get("sampling_rate", 16_000))


def _samples(values: Mapping[str, Any], key: str, rate: int) -> int:
    """Return how many samples so many milliseconds are."""
    number = round(rate * _number(values, key, 0.0, 1000.0) / 1000.0)
    if number < 1:
        raise ConfigError(f"{key}: expected at least one sample, got {values[key]} milliseconds")
    return number


def _number(values: Mapping[str, Any], key: str, least: float, most: float) -> float:
    value = values[key]
    if type(value) not in (int, float) or not least <= value <= most:
        raise ConfigError(
            f"{key}: expected a number from {least:g} to {most:g}, got {reprlib.repr(value)}"
        )
    return float(value)


def _switch(values: Mapping[str, Any], key: str) -> bool:
    if not isinstance(values[key], bool):
        raise ConfigError(f"{key}: expected true or false, got {reprlib.repr(values[key])}")
    return bool(values[key])


def _per_bin(values: Mapping[str, Any], key: str, bins: int) -> tuple[float, ...] | None:
    numbers = values.get(key)
    if numbers is None:
        return None
    is_list = isinstance(numbers, list | tuple) and len(numbers) == bins
    least = 1e-12 if key == "per_bin_stddev" else -1e6
    if not is_list or not all(type(x) in (int, float) and least <= x <= 1e6 for x in numbers):
        raise ConfigError(
            f"{key}: expected {bins} numbers from {least:g} to 1e6, got {reprlib.repr(numbers)}"
        )
    return tuple(float(x) for x in numbers)


def _token_id(raw: Mapping[str, Any], default: int) -> int:
    value = raw.get("audio_token_id", default)
    if type(value) is not int or not 0 <= value < MAX_TOKEN_ID:
        raise ConfigError(f"audio_token_id: expected a token id, got {reprlib.repr(value)}")
    return value


def _offset(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKEN_ID:
        raise ConfigError(f"vocab_offset: expected a token id, got {reprlib.repr(value)}")
    return value


def _as_lists(value: Any) -> Any:
    is_list = isinstance(value, list | tuple)
    return [_as_lists(inner) for inner in value] if is_list else value
