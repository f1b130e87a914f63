"""Reads a Hugging Face folder's settings of pictures, and checks the tokens around them."""

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.config_reader import check_keys
from beam_gemma.model.gemma4_vision import IMAGE_TOKEN_ID
from beam_gemma.model.sound_settings import SOUND_SETTINGS
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import OUTER_KEYS, VisionConfig
from export.checkpoints.sidecar_files import read_optional_json

GEMMA3_TEXT = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""Values that published config.json files of Gemma 3 4B to 27B omit: transformers' defaults."""
PALIGEMMA_TEXT: dict[str, dict[str, Any]] = {
    "gemma": {"max_position_embeddings": 8192},
    "gemma2": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
}
"""The same for the text models of PaliGemma, by their `model_type`."""
MARKER_IDS = {"boi_token_index": 255_999, "eoi_token_index": 256_000}
"""Keys of the ids around a picture, with those of Gemma 3."""
GEMMA4_MARKER_IDS = {
    "boi_token_id": 255_999,
    "eoi_token_id": 258_882,
    "image_token_id": IMAGE_TOKEN_ID,
}
"""Keys of the ids around and of a picture, with those of Gemma 4."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config in the `config.json` of a model that takes pictures.

    Raises:
        ConfigError: a key beside it is not known, or the text model is none of such a model.
    """
    check_keys(raw, OUTER_KEYS)
    text = raw.get("text_config", {})
    if not isinstance(text, dict):
        raise ConfigError(f"text_config: expected a dictionary, got {reprlib.repr(text)}")
    if raw["model_type"] != "paligemma":
        # The reference does not apply this cap in a Gemma 3 with images.
        return {**GEMMA3_TEXT, **text, "final_logit_softcapping": None}
    kind = text.get("model_type", "gemma")
    if not isinstance(kind, str) or kind not in PALIGEMMA_TEXT:
        raise ConfigError(
            f"text_config: expected a model_type of {' or '.join(PALIGEMMA_TEXT)} in a paligemma "
            f"model, got {reprlib.repr(kind)}"
        )
    # Not a setting of the decoder: attention in both directions is that of spans.
    two_sided = text.get("use_bidirectional_attention")
    if two_sided not in (None, True):
        raise ConfigError(
            f"use_bidirectional_attention: expected true in a paligemma model, got "
            f"{reprlib.repr(two_sided)}"
        )
    copies = ("num_image_tokens", "use_bidirectional_attention")
    rest = {key: value for key, value in text.items() if key not in copies}
    return {**PALIGEMMA_TEXT[kind], **rest, "model_type": kind}


def check_text_only(raw: Mapping[str, Any]) -> None:
    """Check that a model can be exported without its tower of pictures.

    Raises:
        ConfigError: it is a PaliGemma, whose text model was trained with pictures alone.
    """
    if raw["model_type"] == "paligemma":
        raise ConfigError(
            "--text_only: expected a model of the Gemma 3 family, got paligemma, whose text model "
            "works with pictures alone; leave the flag out"
        )


def read_vision(folder: Path, raw: Mapping[str, Any]) -> VisionConfig:
    """Read the tower of a folder, with the settings of its image processor where it has them.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: a setting is missing, unknown or not supported.
    """
    return VisionConfig.from_hf(raw, image_settings(folder))


def image_settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings of a folder's image processor; empty if it has none.

    Newer releases of transformers save them as a part of `processor_config.json`.

    Raises:
        CheckpointError: a file is damaged.
    """
    settings = read_optional_json(folder, "preprocessor_config.json")
    if "feature_extractor_type" in settings:  # the file is also, or only, that of sound
        settings = {key: x for key, x in settings.items() if key not in SOUND_SETTINGS}
    if not settings:
        settings = read_optional_json(folder, "processor_config.json").get("image_processor") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{folder / 'processor_config.json'}: expected image_processor as a dictionary, got "
            f"{reprlib.repr(settings)}"
        )
    return settings


def check_markers(
    folder: Path, vision: VisionConfig, raw: Mapping[str, Any], tokenizer_model: Callable[[], bytes]
) -> None:
    """Check that the pieces around a picture have the ids that `config.json` gives them.

    Raises:
        CheckpointError: the tokenizer has other pieces there.
    """
    if vision.begin_token is None:
        return
    ids = Tokenizer(tokenizer_model()).control_pieces
    keys = GEMMA4_MARKER_IDS if vision.image_step else MARKER_IDS
    # The tokenizer of a Gemma 3n need not have the pieces behind a picture and in place of it.
    pieces = (vision.begin_token, vision.end_token, vision.image_token)
    for piece, (key, default) in zip(pieces, keys.items(), strict=False):
        if piece is None:
            continue
        expected = raw.get(key, raw.get(key.replace("_index", "_id"), default))
        if piece not in ids or ids[piece] != expected:
            raise CheckpointError(
                f"{folder}: expected {key} of config.json as the id of the tokenizer's piece "
                f"{piece}, {ids.get(piece)}, got {reprlib.repr(expected)}"
            )
