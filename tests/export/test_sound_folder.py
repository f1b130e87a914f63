"""Where a Hugging Face folder has its settings of sound, in older and newer files."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3nAudioFeatureExtractor

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.sound_settings import read_sound_config
from export.checkpoints.sound_folder import sound_settings
from export.checkpoints.vision_folder import image_settings

RAW = {"model_type": "gemma3n", "audio_config": {"model_type": "gemma3n_audio"}}
SAVED: dict[str, Any] = json.loads(Gemma3nAudioFeatureExtractor().to_json_string())
PICTURES = {"image_processor_type": "SiglipImageProcessorFast", "resample": 2}


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def test_newer_folders_have_them_in_the_processor_s_file(tmp_path: Path) -> None:
    content = {"feature_extractor": SAVED, "audio_seq_length": 188, "image_processor": PICTURES}
    write(tmp_path, "processor_config.json", content)
    assert sound_settings(tmp_path) == {**SAVED, "audio_seq_length": 188}
    assert image_settings(tmp_path) == PICTURES


def test_older_folders_have_them_beside_those_of_pictures(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {**PICTURES, **SAVED})
    write(tmp_path, "processor_config.json", {"audio_seq_length": 188})
    assert read_sound_config(RAW, sound_settings(tmp_path)) == read_sound_config(RAW, {})
    assert image_settings(tmp_path) == PICTURES


def test_a_misspelt_setting_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {**SAVED, "mel_flor": 1.0})
    with pytest.raises(ConfigError, match=r"'mel_flor' is not known; did you mean mel_floor"):
        read_sound_config(RAW, sound_settings(tmp_path))


def test_settings_that_are_no_dictionary_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "processor_config.json", {"feature_extractor": [1]})
    with pytest.raises(CheckpointError, match="expected feature_extractor as a dictionary"):
        sound_settings(tmp_path)


def test_a_folder_without_settings_has_the_defaults(tmp_path: Path) -> None:
    assert sound_settings(tmp_path) == {}
