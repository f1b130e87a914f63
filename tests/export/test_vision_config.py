"""Reading the settings of a tower: published files, files of transformers, and faults."""

import copy
import json
from typing import Any

import pytest

from beam_gemma.errors import ConfigError
from beam_gemma.model.vision_config import VisionConfig
from export.checkpoints.released_sizes import VISION_SIZES
from tests.doubles.vision_models import MODELS, preprocessor_settings, vision_model_config

GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "model_type": "gemma3_text"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
"""What the 4B's file says of pictures."""
PALIGEMMA: dict[str, Any] = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {"hidden_size": 2048, "model_type": "gemma", "num_image_tokens": 256},
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
    "vocab_size": 257152,
}
"""PaliGemma 3B at 224 pixels, which its file does not name."""


def test_a_published_gemma_3() -> None:
    vision = VisionConfig.from_hf(GEMMA3)
    assert (vision.projector, vision.bidirectional) == ("pooled", "picture")
    assert vision.first_position == 0
    assert (vision.num_patches, vision.num_image_tokens, vision.head_dim) == (4096, 256, 72)
    assert (vision.begin_token, vision.end_token) == ("<start_of_image>", "<end_of_image>")
    assert vision.image_token_id == 262144
    assert (vision.layer_norm_eps, vision.resample) == (1e-6, "bilinear")
    assert vision.image_mean == vision.image_std == (0.5, 0.5, 0.5)


def test_a_published_paligemma() -> None:
    vision = VisionConfig.from_hf(PALIGEMMA)
    assert (vision.projector, vision.bidirectional) == ("linear", "prefix")
    assert vision.first_position == 1
    assert (vision.image_size, vision.num_patches, vision.num_image_tokens) == (224, 256, 256)
    assert (vision.begin_token, vision.end_token) == (None, None)
    assert (vision.image_token_id, vision.resample) == (257152, "bicubic")


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_says_the_same(name: str) -> None:
    config = vision_model_config(name)
    vision = VisionConfig.from_hf(config.to_dict(), preprocessor_settings(name))
    tower = config.vision_config
    assert vision.hidden_size == tower.hidden_size
    assert vision.intermediate_size == tower.intermediate_size
    assert vision.num_hidden_layers == tower.num_hidden_layers
    assert vision.num_attention_heads == tower.num_attention_heads
    assert vision.layer_norm_eps == tower.layer_norm_eps
    assert vision.image_token_id == config.image_token_index
    assert vision.num_image_tokens == 16
    assert VisionConfig.from_json(json.loads(json.dumps(vision.to_json()))) == vision


@pytest.mark.parametrize("size", VISION_SIZES, ids=lambda size: size.name)
def test_a_released_size_is_read(size: Any) -> None:
    vision = size.vision
    expected = 256 if vision.projector == "pooled" else (vision.image_size // 14) ** 2
    assert vision.num_image_tokens == expected
    assert size.config.head_dim in (128, 256)


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return settings with changed keys; those with a dot are of the tower, None removes one."""
    result = copy.deepcopy(raw)
    for key, value in changes.items():
        section = result["vision_config"] if key.startswith("tower_") else result
        name = key.removeprefix("tower_")
        if value is None:
            section.pop(name)
        else:
            section[name] = value
    return result


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (changed(GEMMA3, model_type="gemma3n"), "expected one of gemma3, .*got 'gemma3n'"),
        (changed(GEMMA3, vision_config=None), "vision_config: expected a dictionary.*got None"),
        (changed(GEMMA3, vision_config=[1]), r"vision_config: expected a dictionary.*got \[1\]"),
        (changed(GEMMA3, tower_hidden_size=None), "expected hidden_size as a whole.*got None"),
        (changed(GEMMA3, tower_hidden_size=1150), "that num_attention_heads .16. divides"),
        (changed(GEMMA3, tower_hidden_size=1 << 20), "expected hidden_size as a whole number"),
        (changed(GEMMA3, tower_num_hidden_layers=True), "expected num_hidden_layers as a whole"),
        (changed(PALIGEMMA, tower_image_size=225), "an image_size that patch_size"),
        (changed(GEMMA3, tower_image_size=[896, 896]), "expected image_size as a whole number"),
        (changed(GEMMA3, tower_patch_size=0), "expected patch_size as a whole number from 1"),
        (changed(GEMMA3, tower_hiden_size=3), "'hiden_size' is not known.*hidden_size"),
        (changed(GEMMA3, tower_hidden_act="gelu"), "hidden_act: expected one of"),
        (changed(GEMMA3, tower_num_channels=4), "num_channels: expected one of"),
        (changed(GEMMA3, tower_model_type="clip"), "model_type: expected one of .'siglip_vision"),
        (changed(GEMMA3, tower_layer_norm_eps=0), "layer_norm_eps: expected a number above 0"),
        (changed(GEMMA3, mm_tokens_per_image=255), "a square number.*got 255"),
        (changed(GEMMA3, mm_tokens_per_image=25), "whose root divides 64 patches"),
        (changed(GEMMA3, image_token_index=-1), "image_token_index: expected one whole number"),
        (changed(GEMMA3, image_token_id=7), "image_token_index: expected one whole number"),
        (changed(GEMMA3, mm_token_per_image=256), "'mm_token_per_image' is not known.*mm_tokens"),
        (changed(PALIGEMMA, image_token_index=None), "expected the key 'image_token_index'"),
    ],
)
def test_a_fault_is_named(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        VisionConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": {"height": 896, "width": 224}}, "size: expected a height and a width of 896"),
        ({"size": {"shortest_edge": 896}}, "size: expected a height and a width of 896"),
        ({"size": 896}, "size: expected a dictionary"),
        ({"resample": 1}, r"resample: expected 2 \(bilinear\) or 3"),
        ({"resample": "bilinear"}, "resample: expected 2"),
        ({"do_normalize": False}, "do_normalize: expected True, got False"),
        ({"do_convert_rgb": False}, "do_convert_rgb: expected True, got False"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan: expected False, got True"),
        ({"pan_and_scan_max_num_crops": 8}, "pan_and_scan_max_num_crops: expected 4, got 8"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: expected 1 / 255"),
        ({"image_seq_length": 255}, "image_seq_length: expected 256, got 255"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: expected three numbers"),
        ({"image_mean": [0.5, 0.5, "a"]}, "image_mean: expected numbers that pixels"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std: expected numbers that pixels"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "image_std: expected numbers that pixels"),
        ({"image_sdt": [0.5] * 3}, "'image_sdt' is not known.*image_std"),
    ],
)
def test_a_fault_of_the_image_processor_is_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        VisionConfig.from_hf(GEMMA3, settings)


def test_an_image_processor_may_have_its_own_numbers() -> None:
    """MedGemma and others could be trained on them; `null` stands for what is usual."""
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 0.25], "resample": 3,
                "do_resize": None, "size": None, "pan_and_scan_min_crop_size": 256}  # fmt: skip
    vision = VisionConfig.from_hf(GEMMA3, settings)
    assert vision.image_mean == (0.1, 0.2, 0.3)
    assert vision.image_std == (1.0, 0.5, 0.25)
    assert vision.resample == "bicubic"
