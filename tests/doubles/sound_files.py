"""Files of sound, and the sound halves of the published models with transformers' extractors."""

import io
from typing import Any

import numpy as np
import soundfile
from transformers import Gemma3nAudioFeatureExtractor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)

from beam_gemma.model.sound_config import MelConfig, SoundConfig

GEMMA3N_MEL: dict[str, Any] = {
    "frame_length": 512, "hop_length": 160, "fft_length": 1024, "min_frequency": 125.0,
    "max_frequency": 7600.0, "preemphasis": 0.97, "preemphasis_htk_flavor": True,
    "mel_floor": 1e-5, "adds_floor": False, "pads_left": 0, "input_scale_factor": 1.0,
    "per_bin_mean": None, "per_bin_stddev": None,
}  # fmt: skip
GEMMA4_MEL = GEMMA3N_MEL | {
    "frame_length": 320, "fft_length": 512, "min_frequency": 0.0, "max_frequency": 8000.0,
    "preemphasis": 0.0, "mel_floor": 1e-3, "adds_floor": True, "pads_left": 160,
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "audio_token_id": 300, "begin_token": "<b>", "end_token": "<e>", "audio_token": "<a>",
    "hidden_size": 8, "output_size": 8, "rms_norm_eps": 1e-6,
}  # fmt: skip


def gemma3n_sound(**mel: Any) -> SoundConfig:
    """Return the sound half of Gemma 3n, with other settings of its mel bins."""
    return SoundConfig(
        encoder="usm",
        num_features=128,
        num_audio_tokens=188,
        mel=MelConfig(**GEMMA3N_MEL | mel),
        **_COMMON,
    )


GEMMA4 = SoundConfig(
    encoder="conformer",
    num_features=128,
    num_audio_tokens=750,
    subsampling_conv_channels=(128, 32),
    mel=MelConfig(**GEMMA4_MEL),
    **_COMMON,
)
GEMMA4_UNIFIED = SoundConfig(
    encoder="frames", num_features=640, num_audio_tokens=750, mel=None, **_COMMON
)
SOUNDS = {
    "gemma3n": (gemma3n_sound(), Gemma3nAudioFeatureExtractor()),
    "gemma4": (GEMMA4, Gemma4AudioFeatureExtractor()),
    "gemma4_unified": (GEMMA4_UNIFIED, Gemma4UnifiedAudioFeatureExtractor()),
}
"""Sound halves of models, each with the published extractor."""
FORMS = [
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"), ("WAV", "ULAW"), ("WAV", "ALAW"), ("WAVEX", "PCM_16"), ("FLAC", "PCM_S8"),
    ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip
"""Kinds of files, and the forms of their samples."""


def signal(num_samples: int, num_channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return a tone under noise [N, C] in float32, which differs in each channel."""
    rng = np.random.default_rng(seed)
    tone = np.sin(np.arange(num_samples)[:, None] * (0.05 + 0.01 * np.arange(num_channels)))
    noise = rng.standard_normal((num_samples, num_channels))
    return (tone * 0.3 + noise * 0.05).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int, kind: str, form: str, **options: Any) -> bytes:
    """Return samples [N, C] as a file that libsndfile writes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=form, **options)
    return file.getvalue()


def published(extractor: Any, samples: np.ndarray) -> np.ndarray:
    """Return the frames that an extractor makes of one clip and marks as valid."""
    made = extractor([samples], return_tensors="np")
    return made["input_features"][0][made["input_features_mask"][0].astype(bool)]
