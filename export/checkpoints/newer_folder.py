"""Reads what a Hugging Face folder of a Gemma 3n, a Gemma 4 or an EmbeddingGemma 2 has on its own.

Released files hold what a model needs for pictures and sound beside the text model. That for
pictures is read in all of them, and that for sound in a Gemma 3n and a Gemma 4; all else is left
out.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import check_keys
from beam_gemma.model.gemma3n_vision import gemma3n_vision
from beam_gemma.model.gemma4_vision import gemma4_vision
from beam_gemma.model.newer_config import OUTER_TYPES, newer_config
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.sound_settings import read_sound_config
from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.sound_folder import sound_settings
from export.checkpoints.sound_tensors import is_of_sound, sound_name
from export.checkpoints.tensors import HEAD
from export.checkpoints.vision_folder import image_settings
from export.checkpoints.vision_tensors import is_of_pictures

LOGGER = logging.getLogger("export")
PREFIX = re.compile(r"(model\.)?(language_model\.)?(model\.)?")
"""What may precede the names of the text model's tensors."""
OF_PICTURES = {
    "gemma3n": gemma3n_vision,
    "gemma4": gemma4_vision,
    "gemma4_unified": gemma4_vision,
    "embedding_gemma2": gemma4_vision,
}
"""Functions that read how a model takes pictures, by its type."""
OF_SOUND = ("gemma3n", "gemma4", "gemma4_unified")
"""Those whose sound is read."""
MODULES = re.compile(r"^ple\.|(?<=\.)ple_block\.")
"""Modules around per-layer embeddings in EmbeddingGemma 2, which have no other names than those of
Gemma 4 but for them."""
UNUSED_KEYS = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.weight")
"""Names of what makes keys and values, which no layer needs that reads those of another."""
OUTER_KEYS = (
    "text_config", "vision_config", "audio_config", "boi_token_id", "eoi_token_id",
    "image_token_id", "video_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index",
    "audio_token_id", "audio_soft_tokens_per_image", "vision_soft_tokens_per_image",
    "tie_word_embeddings",
)  # fmt: skip
"""Keys beside `text_config`: those of towers, tokens around pictures and sound, and copies."""


def read_newer_towers(
    folder: Path, raw: Mapping[str, Any], *, text_only: bool
) -> tuple[VisionConfig | None, SoundConfig | None]:
    """Read how a model takes pictures and sound, and warn of what it has that is left out.

    Args:
        folder: The folder.
        raw: Content of its `config.json`.
        text_only: Whether to leave out what a model has for pictures and sound.

    Returns:
        None for what the model does not take, and for what is left out.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: a setting is missing, unknown or not supported.
    """
    vision, sound = None, None
    if raw["model_type"] in OF_PICTURES and not text_only:
        vision = OF_PICTURES[raw["model_type"]](raw, image_settings(folder))
    if raw["model_type"] in OF_SOUND and not text_only:
        sound = read_sound_config(raw, sound_settings(folder))
    parts = {"vision_config": ("images", vision), "audio_config": ("sound", sound)}
    left = [what for key, (what, read) in parts.items() if raw.get(key) is not None and not read]
    if left:
        LOGGER.warning(
            "%s: exporting the model without what it has for %s", folder, " and ".join(left)
        )
    return vision, sound


def read_newer_config(raw: Mapping[str, Any]) -> GemmaConfig:
    """Read the text model of a `config.json`.

    Raises:
        ConfigError: a key is missing, unknown, or requests an unsupported feature.
    """
    if raw["model_type"] in OUTER_TYPES:
        check_keys(raw, OUTER_KEYS)
    return newer_config(raw)


def newer_name(name: str, config: GemmaConfig) -> str | None:
    """Return our name of a Hugging Face tensor, or None if no graph needs it."""
    if name.removeprefix("language_model.") == HEAD:
        return HEAD
    own = name.removeprefix("model.")
    if is_of_sound(own):
        return sound_name(own)
    if is_of_pictures(own):
        return own
    name = MODULES.sub("", PREFIX.sub("", name, count=1))
    if name.endswith(".altup.correct_output_scale") and not config.altup_correct_scale:
        return None
    unused = UNUSED_KEYS.fullmatch(name)
    if unused and config.first_shared_layer <= int(unused[1]) < config.num_hidden_layers:
        return None
    return name
