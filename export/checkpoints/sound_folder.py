"""Reads a Hugging Face folder's settings of sound."""

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.sound_settings import SOUND_SETTINGS
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.sidecar_files import read_optional_json

GEMMA4_MARKER_IDS = {
    "begin_token": ("boa_token_id", 256_000),
    "end_token": ("eoa_token_index", 258_883),
    "audio_token": ("audio_token_id", 258_881),
}
"""Keys of the ids around and of a clip, with those of Gemma 4; `eoa_token_index` is also written
`eoa_token_id`."""
GEMMA3N_MARKER_IDS = {
    "begin_token": ("boa_token_id", 256_000),
    "audio_token": ("audio_token_id", 262_273),
}
"""The same of Gemma 3n, whose end of a clip is a row of the clip itself."""


def sound_settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings of a folder's feature extractor, with the processor's tokens of a clip.

    Newer releases of transformers save them as a part of `processor_config.json`; older ones beside
    those of pictures.

    Raises:
        CheckpointError: a file is damaged.
    """
    processor = read_optional_json(folder, "processor_config.json")
    settings = processor.get("feature_extractor")
    if settings is None:
        settings = read_optional_json(folder, "preprocessor_config.json")
        is_mixed = "image_processor_type" in settings or "feature_extractor_type" not in settings
        if is_mixed:
            settings = {key: x for key, x in settings.items() if key in SOUND_SETTINGS}
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{folder / 'processor_config.json'}: expected feature_extractor as a dictionary, got "
            f"{reprlib.repr(settings)}"
        )
    tokens = processor.get("audio_seq_length")
    return settings if tokens is None else {**settings, "audio_seq_length": tokens}


def check_sound_markers(
    folder: Path, sound: SoundConfig, raw: Mapping[str, Any], tokenizer_model: Callable[[], bytes]
) -> None:
    """Check that the pieces of a clip have the ids that `config.json` gives them.

    Raises:
        CheckpointError: the tokenizer has other pieces there.
    """
    ids = Tokenizer(tokenizer_model()).control_pieces
    markers = GEMMA3N_MARKER_IDS if sound.end_token is None else GEMMA4_MARKER_IDS
    for field, (key, default) in markers.items():
        piece = getattr(sound, field)
        expected = raw.get(key, raw.get(key.replace("_index", "_id"), default))
        if piece not in ids or ids[piece] != expected:
            raise CheckpointError(
                f"{folder}: expected {key} of config.json as the id of the tokenizer's piece "
                f"{piece}, {ids.get(piece)}, got {reprlib.repr(expected)}"
            )
