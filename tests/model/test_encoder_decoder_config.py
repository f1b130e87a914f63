"""Reading the config.json of models with an encoder: transformers' files, copies and refusals."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.encoder_decoder_config import (
    DEFAULTS,
    UNSAID,
    encoder_decoder_configs,
    picture_settings,
    start_token_id,
)
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.vision_config import VisionConfig
from tests.doubles.encoder_decoder_models import MODELS, WINDOWS, model_config

STACK = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
    "classifier_dropout_rate": 0.0, "cross_attention_hidden_size": None, "dropout_rate": 0.0,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
    "layer_types": [SLIDING, FULL] * 13, "max_position_embeddings": 8192,
    "model_type": "t5_gemma_module", "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
    "vocab_size": 256000, "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 107],
}  # fmt: skip
T5GEMMA = {
    **{key: value for key, value in STACK.items() if key != "model_type"},
    "architectures": ["T5GemmaForConditionalGeneration"], "is_encoder_decoder": True,
    "model_type": "t5gemma", "use_cache": True, "transformers_version": "4.53.0.dev0",
    "encoder": STACK,
    "decoder": {**STACK, "is_decoder": True, "cross_attention_hidden_size": 2304},
}  # fmt: skip
"""A file that repeats the keys of a section at the top."""
TEXT = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "sliding_window": 512, "_sliding_window_pattern": 6,
}  # fmt: skip
TOWER = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 896, "attention_dropout": 0.0,
}  # fmt: skip
T5GEMMA2: dict[str, Any] = {
    "model_type": "t5gemma2", "is_encoder_decoder": True, "image_token_index": 256001,
    "eoi_token_index": 256000, "dropout_rate": 0.0, "tie_word_embeddings": True,
    "encoder": {
        "model_type": "t5gemma2_encoder", "text_config": {**TEXT, "model_type": "t5gemma2_text"},
        "vision_config": TOWER, "image_token_index": 256001, "eoi_token_index": 256000,
        "boi_token_index": 255999, "mm_tokens_per_image": 256, "dropout_rate": 0.0,
    },
    "decoder": {**TEXT, "model_type": "t5gemma2_decoder", "final_logit_softcapping": 30.0},
}  # fmt: skip

RAW = {"t5gemma": T5GEMMA, "t5gemma2": T5GEMMA2}


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a path of keys with dots between them."""
    key, _, rest = path.partition(".")
    return {**raw, key: changed(raw[key], rest, value) if rest else value}


def test_t5gemma_has_the_blocks_of_gemma_2_on_both_sides() -> None:
    decoder, encoder = encoder_decoder_configs(T5GEMMA)
    for config in (decoder, encoder):
        assert config.model_type == "t5gemma"
        assert config.layer_types == (SLIDING, FULL) * 13
        assert config.attn_logit_softcapping == 50.0
        assert config.has_post_norms
        assert not config.has_qk_norm
    assert encoder.use_bidirectional_attention
    assert not decoder.use_bidirectional_attention
    assert (decoder.cross_attention_hidden_size, encoder.cross_attention_hidden_size) == (
        2304,
        None,
    )
    assert decoder.final_logit_softcapping == 30.0
    assert decoder.reads_source
    assert not decoder.merges_attention
    assert decoder.eoi_token_id is None


def test_t5gemma_2_has_the_blocks_of_gemma_3_on_both_sides() -> None:
    decoder, encoder = encoder_decoder_configs(T5GEMMA2)
    for config in (decoder, encoder):
        assert config.layer_types == ((SLIDING,) * 5 + (FULL,)) * 3
        assert config.has_qk_norm
        assert config.max_position_embeddings == 131072
        assert config.rope(FULL).rope_theta == 1e6
        assert config.eoi_token_id == 256000
    assert decoder.merges_attention
    assert decoder.final_logit_softcapping == 30.0
    vision = VisionConfig.from_hf(picture_settings(T5GEMMA2))
    assert (vision.image_token_id, vision.num_image_tokens) == (256001, 256)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_transformers_writes_is_read(name: str) -> None:
    """Written in full, and without what its classes say."""
    theirs = model_config(name)
    full = encoder_decoder_configs(theirs.to_dict())
    assert encoder_decoder_configs(theirs.to_diff_dict()) == full
    decoder, encoder = full
    assert (encoder.sliding_window, decoder.sliding_window) == tuple(WINDOWS.values())
    assert decoder.tie_word_embeddings == (name != "t5gemma_untied")
    assert start_token_id(theirs.to_dict()) == 2


@pytest.mark.parametrize(
    ("model_type", "config_class"),
    [
        ("t5gemma", transformers.T5GemmaModuleConfig),
        ("t5gemma2", transformers.T5Gemma2Config().decoder.__class__),
        ("t5gemma2", transformers.T5Gemma2Config().encoder.text_config.__class__),
    ],
)
def test_what_a_file_omits_is_what_transformers_says(model_type: str, config_class: Any) -> None:
    theirs = config_class()
    for key, value in DEFAULTS[model_type].items():
        assert getattr(theirs, key) == value


def test_a_copy_of_the_encoders_values_at_the_top_is_no_contradiction() -> None:
    """As in a 9B-2B, whose stacks differ."""
    raw = changed(T5GEMMA, "encoder.hidden_size", 3584)
    raw = changed(raw, "decoder.cross_attention_hidden_size", 3584)
    for copy in (2304, 3584):
        decoder, encoder = encoder_decoder_configs({**raw, "hidden_size": copy})
        assert (decoder.hidden_size, encoder.hidden_size) == (2304, 3584)
        assert decoder.cross_attention_hidden_size == 3584


def test_a_copy_at_the_top_of_what_the_sections_omit_is_no_contradiction() -> None:
    stack = {"model_type": "t5_gemma_module"}
    raw = {**T5GEMMA, "encoder": stack, "decoder": stack}
    assert encoder_decoder_configs(raw) == encoder_decoder_configs(T5GEMMA)
    assert {key: getattr(transformers.T5GemmaModuleConfig(), key, 10000.0) for key in UNSAID} == (
        UNSAID
    )


def test_a_head_of_its_own_is_that_of_a_t5gemma_alone() -> None:
    decoder, encoder = encoder_decoder_configs({**T5GEMMA, "tie_word_embeddings": False})
    assert not decoder.tie_word_embeddings
    assert encoder.tie_word_embeddings
    with pytest.raises(ConfigError, match="tie_word_embeddings: expected true"):
        encoder_decoder_configs({**T5GEMMA2, "tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("name", "path", "value", "sentence"),
    [
        ("t5gemma", "hidden_sise", 1, "'hidden_sise' is not known; did you mean hidden_size"),
        ("t5gemma", "encoder.hidden_sise", 1, "'hidden_sise' is not known; did you mean"),
        ("t5gemma", "encoder", None, "encoder: expected a dictionary, got None"),
        ("t5gemma", "decoder", [], r"decoder: expected a dictionary, got \[\]"),
        ("t5gemma", "is_encoder_decoder", False, "is_encoder_decoder: expected true"),
        ("t5gemma", "hidden_size", 9, "expected at the top what the decoder or the encoder says"),
        ("t5gemma", "rope_theta", 1e6, "rope_theta: expected at the top what the decoder"),
        ("t5gemma", "decoder.model_type", "gemma2", "expected a model_type of t5_gemma_module"),
        ("t5gemma", "decoder.cross_attention_hidden_size", 9, "hidden_size of the encoder"),
        ("t5gemma", "decoder_start_token_id", 0, "expected the bos_token_id of the decoder"),
        ("t5gemma", "bos_token_id", 5, "expected the bos_token_id of the decoder"),
        ("t5gemma", "decoder.bos_token_id", True, "expected the bos_token_id of the decoder"),
        ("t5gemma", "encoder.use_bidirectional_attention", True, "use_bidirectional_attention"),
        ("t5gemma", "encoder.vocab_size", 100, "vocab_size: expected the same in the encoder"),
        ("t5gemma", "encoder.num_hidden_layers", 0, "num_hidden_layers: expected a whole number"),
        ("t5gemma", "decoder.hidden_activation", "relu", "hidden_activation: expected one of"),
        ("t5gemma2", "hidden_size", 640, "'hidden_size' is not known"),
        ("t5gemma2", "encoder.hidden_size", 640, "'hidden_size' is not known"),
        ("t5gemma2", "encoder.text_config", None, "text_config: expected a dictionary"),
        ("t5gemma2", "decoder.hidden_size", 1152, "hidden_size: expected the same in the encoder"),
        ("t5gemma2", "eoi_token_index", 7, "eoi_token_index: expected one token id"),
        ("t5gemma2", "encoder.eoi_token_index", -1, "eoi_token_index: expected one token id"),
        ("t5gemma2", "decoder.rope_scaling", {"rope_type": "yarn"}, "expected default or linear"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_refused(name: str, path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        encoder_decoder_configs(changed(RAW[name], path, value))


def test_the_id_of_a_pictures_end_is_in_the_vocabulary() -> None:
    raw = changed(T5GEMMA2, "eoi_token_index", 262144)
    with pytest.raises(ConfigError, match="expected a token id below vocab_size"):
        encoder_decoder_configs(changed(raw, "encoder.eoi_token_index", 262144))


def test_the_id_of_a_pictures_tokens_is_the_one_at_the_top() -> None:
    """Where the key is missing, it is not the encoder's, which transformers overrides."""
    raw = {key: value for key, value in T5GEMMA2.items() if key != "image_token_index"}
    assert picture_settings(raw)["image_token_index"] == 256001
    with pytest.raises(ConfigError, match="image_token_index: expected one token id"):
        picture_settings(changed(raw, "encoder.image_token_index", 262144))


def test_an_encoder_alone_may_attend_to_both_sides() -> None:
    decoder, _ = encoder_decoder_configs(T5GEMMA)
    values = {name: getattr(decoder, name) for name in GemmaConfig.__slots__}
    with pytest.raises(ConfigError, match="use_bidirectional_attention: expected false"):
        GemmaConfig(**{**values, "use_bidirectional_attention": True})


def paths(raw: dict[str, Any], start: str = "") -> Iterator[str]:
    for key, value in raw.items():
        yield start + key
        if isinstance(value, dict):
            yield from paths(value, f"{start}{key}.")


@pytest.mark.parametrize("value", [None, True, -1, 0, 1 << 40, 1.5, "a", [], [1], {}, {"a": 1}])
@pytest.mark.parametrize("name", RAW)
def test_a_value_of_any_kind_is_read_or_refused(name: str, value: Any) -> None:
    """In the place of each value of a file, by the project's own error."""
    for path in paths(RAW[name]):
        if path != "model_type":
            raw = changed(RAW[name], path, value)
            with contextlib.suppress(ConfigError):
                encoder_decoder_configs(raw)
                if name == "t5gemma2":
                    VisionConfig.from_hf(picture_settings(raw))
