"""The settings of sound are read as transformers has them, and clips counted as it counts them."""

import json
from typing import Any

import numpy as np
import pytest
from transformers import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)

from beam_gemma.errors import ConfigError
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.sound_settings import read_sound_config

GEMMA4 = {"model_type": "gemma4", "audio_config": {"model_type": "gemma4_audio"}}
UNIFIED = {"model_type": "gemma4_unified", "audio_config": {"model_type": "gemma4_unified_audio"}}
GEMMA3N = {"model_type": "gemma3n", "audio_config": {"model_type": "gemma3n_audio"}}
EMBEDDING = {**GEMMA4, "model_type": "embedding_gemma2"}
MODELS = {"gemma4": GEMMA4, "unified": UNIFIED, "gemma3n": GEMMA3N, "embedding": EMBEDDING}
EXTRACTORS = {
    "gemma4": Gemma4AudioFeatureExtractor,
    "unified": Gemma4UnifiedAudioFeatureExtractor,
    "gemma3n": Gemma3nAudioFeatureExtractor,
    "embedding": Gemma4AudioFeatureExtractor,
}
LENGTHS = (161, 162, 320, 321, 480, 481, 482, 513, 600, 640, 641, 2400, 2401, 12_345, 48_000)


def config_of(name: str, settings: dict[str, Any] | None = None) -> SoundConfig:
    """Read the defaults of a model, changed by settings of its extractor."""
    config = read_sound_config(MODELS[name], settings or {})
    assert config is not None
    return config


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_clip_alone_has_the_frames_of_the_reference(name: str, length: int) -> None:
    clips = [np.ones(length, np.float32)]
    mask = EXTRACTORS[name]()(clips, return_tensors="np")["input_features_mask"]
    assert config_of(name).num_frames_of(length) == int(np.asarray(mask).sum())


@pytest.mark.parametrize("name", ["gemma4", "unified"])
def test_a_clip_has_the_tokens_of_the_reference(name: str) -> None:
    """The processors halve the mask twice, or take each frame for a token."""
    config = config_of(name)
    for frames in (1, 2, 3, 4, 5, 8, 9, 11, 299):
        halved = np.ones(frames, bool)[::2][::2]
        expected = int(halved.sum()) if name == "gemma4" else frames
        assert config.tokens_of_frames(frames) == expected


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("gemma4", 2999, 750),
        ("unified", 750, 750),
        ("gemma3n", 2997, 189),
        ("embedding", 2999, 750),
    ],
)
def test_the_longest_clip_has_the_tokens_that_processors_allow(
    name: str, frames: int, tokens: int
) -> None:
    config = config_of(name)
    assert config.num_frames_of(480_000) == frames
    assert config.tokens_of(480_000) == config.num_audio_tokens == tokens
    assert config.tokens_of(0) == 0


def test_a_clip_of_gemma3n_has_a_row_more_than_the_tokens_of_its_processor() -> None:
    config = config_of("gemma3n")
    assert (config.num_tower_tokens(2997), config.tokens_of(513)) == (188, 189)
    assert (config.surround, config.end_token) == ("\n\n", None)


@pytest.mark.parametrize("name", MODELS)
def test_saved_settings_are_the_defaults(name: str) -> None:
    settings = json.loads(EXTRACTORS[name]().to_json_string())
    config = config_of(name, settings)
    assert config == config_of(name)
    assert SoundConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", ["gemma4", "gemma3n"])
def test_frames_are_cut_as_the_extractor_says(name: str) -> None:
    mel, extractor = config_of(name).mel, EXTRACTORS[name]()
    assert mel is not None
    for key in ("frame_length", "hop_length", "fft_length", "min_frequency", "max_frequency",
                "preemphasis", "preemphasis_htk_flavor", "input_scale_factor"):  # fmt: skip
        assert getattr(mel, key) == getattr(extractor, key)
    assert mel.mel_floor == float(extractor.mel_floor)


def test_bins_have_a_mean_and_a_deviation() -> None:
    settings = {"per_bin_mean": [0.5] * 128, "per_bin_stddev": [2] * 128}
    mel = config_of("gemma4", settings).mel
    assert mel is not None
    assert (mel.per_bin_mean, mel.per_bin_stddev) == ((0.5,) * 128, (2.0,) * 128)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gemma4", {"mel_flor": 1.0}, "'mel_flor' is not known; did you mean mel_floor?"),
        ("gemma4", {"dither": 0.1}, "dither: expected 0, got 0.1"),
        ("gemma4", {"frame_length": 400}, "frame_length: expected 320, got 400"),
        ("gemma4", {"max_frequency": 9000.0}, "max_frequency: expected a number from 0 to 8000"),
        ("gemma4", {"mel_floor": 0}, "mel_floor: expected a number above 0"),
        ("gemma4", {"feature_size": 80}, "as many subsampling_conv_channels in the first"),
        ("gemma3n", {"feature_size": 80}, r"input_feat_size: expected one of \(80,\), got 128"),
        ("gemma4", {"per_bin_mean": [0.0]}, "per_bin_mean: expected 128 numbers"),
        ("gemma3n", {"audio_seq_length": 100}, "audio_soft_tokens_per_image: expected 100"),
        ("unified", {"audio_samples_per_token": 320}, "audio_samples_per_token: expected 640"),
        ("unified", {"mel_floor": 1.0}, "the key 'mel_floor' is not known"),
    ],
)  # fmt: skip
def test_settings_that_do_not_suit_are_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    raw = dict(MODELS[name])
    if "input_feat_size" in message:
        raw["audio_config"] = {**raw["audio_config"], "input_feat_size": 128}
    with pytest.raises(ConfigError, match=message):
        read_sound_config(raw, settings)


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("gemma4", {"hiden_size": 8}, "'hiden_size' is not known; did you mean hidden_size?"),
        ("gemma4", {"hidden_act": "relu"}, "hidden_act: expected one of"),
        ("gemma4", {"attention_context_left": 1}, "attention_context_left: expected at least 2"),
        ("gemma4", {"attention_invalid_logits_value": 1e-9}, "attention_invalid_logits_value"),
        ("gemma4", {"num_attention_heads": 7}, "an even hidden_size that num_attention_heads"),
        ("gemma3n", {"sscp_conv_stride_size": [[1, 2], [2, 2]]}, "sscp_conv_stride_size"),
        ("gemma3n", {"vocab_offset": 262_273}, "eoa_token_id: expected 262273, got 262272"),
        ("gemma3n", {"vocab_size": 64}, "vocab_size: expected 262336, got 262400"),
        ("unified", {"model_type": "gemma4_audio"}, "model_type: expected one of"),
    ],
)  # fmt: skip
def test_towers_that_cannot_be_built_are_refused(
    name: str, section: dict[str, Any], message: str
) -> None:
    raw = {**MODELS[name], "audio_config": {**MODELS[name]["audio_config"], **section}}
    with pytest.raises(ConfigError, match=message):
        read_sound_config(raw, {})


def test_a_model_without_sound_has_none() -> None:
    assert read_sound_config({"model_type": "gemma4"}, {}) is None
    assert read_sound_config({"model_type": "gemma4", "audio_config": None}, {}) is None
