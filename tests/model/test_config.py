"""Reading config.json: published spellings, defaults, and refusals."""

import re

import pytest
import transformers

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import MAX_SIZES, NEWER_SIZES
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.rope import RopeParameters

GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu",
    "hidden_activation": None, "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True,
    "vocab_size": 256000,
}  # fmt: skip
GEMMA2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608, "initializer_range": 0.02, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
    "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_4B_TEXT = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
    "num_attention_heads": 8, "num_hidden_layers": 34, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024, "vocab_size": 262208,
}  # fmt: skip


def test_gemma_1_has_no_window_and_no_extra_norms() -> None:
    config = GemmaConfig.from_hf(GEMMA_2B)
    assert config.layer_types == (FULL,) * 18
    assert config.window(FULL) is None
    assert not config.has_post_norms
    assert not config.has_qk_norm
    assert config.attention_scale == 256**-0.5
    assert config.rope(FULL).rope_theta == 10000.0


def test_gemma_2_starts_with_a_local_layer() -> None:
    config = GemmaConfig.from_hf(GEMMA2_27B)
    assert config.layer_types[:4] == (SLIDING, FULL, SLIDING, FULL)
    assert config.window(SLIDING) == 4096
    assert config.attention_scale == 144**-0.5
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.rope(SLIDING) == config.rope(FULL)


def test_gemma_3_makes_every_sixth_layer_full_and_scales_only_those() -> None:
    config = GemmaConfig.from_hf(GEMMA3_4B_TEXT)
    assert config.layers_of(FULL) == (5, 11, 17, 23, 29)
    assert config.layer_types[-1] == SLIDING
    assert (config.rope(FULL).rope_theta, config.rope(FULL).factor) == (1e6, 8.0)
    assert (config.rope(SLIDING).rope_theta, config.rope(SLIDING).factor) == (1e4, 1.0)
    assert config.has_qk_norm


def test_a_softcap_that_the_gemma_3_reference_ignores_is_ignored() -> None:
    config = GemmaConfig.from_hf({**GEMMA3_4B_TEXT, "attn_logit_softcapping": 50.0})
    assert config.attn_logit_softcapping is None


def test_embedding_gemma_keeps_the_window_of_its_file() -> None:
    """As released, and as transformers 5.23 writes what it has loaded: it halves in between."""
    released = {**GEMMA3_4B_TEXT, "use_bidirectional_attention": True, "sliding_window": 512}
    loaded = transformers.Gemma3TextConfig(**released)
    assert loaded.sliding_window == 257
    for raw in (released, loaded.to_dict()):
        config = GemmaConfig.from_hf(raw)
        assert config.use_bidirectional_attention
        assert config.window(SLIDING) == 512


def test_vaultgemma_has_the_softcaps_and_layers_that_its_file_says() -> None:
    base = {**GEMMA2_27B, "model_type": "vaultgemma"}
    released = {
        **base,
        "layer_types": [FULL] * 46,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    config = GemmaConfig.from_hf(released)
    assert config.groups == (FULL,)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)
    assert not config.has_post_norms
    for key in ("layer_types", "attn_logit_softcapping", "final_logit_softcapping"):
        released.pop(key)
    # What a file leaves out is what the class of transformers says.
    config = GemmaConfig.from_hf(released)
    theirs = transformers.VaultGemmaConfig(num_hidden_layers=46)
    assert config.layer_types == tuple(theirs.layer_types)
    assert config.attn_logit_softcapping == theirs.attn_logit_softcapping
    assert config.final_logit_softcapping == theirs.final_logit_softcapping


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"slidng_window": 1}, "'slidng_window' is not known; did you mean sliding_window"),
        ({"model_type": "gemma4"}, "got 'gemma4'"),
        ({"hidden_activation": "relu"}, "hidden_activation: expected one of"),
        ({"use_bidirectional_attention": True, "sliding_window": 257}, "even number .* put 512"),
        ({"use_bidirectional_attention": True, "model_type": "gemma2"}, "expected false in a gem"),
        ({"num_attention_heads": 7}, "expected a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "expected 34 entries"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "expected default or linear"),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "expected the key rope_type, got type",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "full_attention: expected factor, got"),
        (
            {"rope_scaling": {"factor": 8.0, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' is",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_scaling: expected none beside"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": None}, "full_attention and slid"),
        ({"model_type": "gemma2", "rope_scaling": None, "rope_parameters": {FULL: {}}}, "one set"),
        ({"model_type": "gemma2", "rope_local_base_freq": 1e4}, "'rope_local_base_freq' is not kn"),
        ({"model_type": "gemma2", "sliding_window_pattern": 6}, "expected 2 in a gemma2 model"),
        ({"_sliding_window_pattern": 4}, "expected 6 in a gemma3_text model without layer_types"),
        ({"model_type": "gemma", "query_pre_attn_scalar": 99}, "'query_pre_attn_scalar' is not kn"),
        ({"model_type": "gemma", "layer_types": [SLIDING] * 34}, "full_attention alone in a gemma"),
        ({"hidden_activation": "gelu"}, "hidden_activation: expected one of"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected one of"),
        ({"tie_word_embeddings": False}, "expected true for a Gemma model"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GemmaConfig.from_hf({**GEMMA3_4B_TEXT, **change})


LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": 3e4},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LINEAR, "rope_theta": 3e4},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
        {"rope_parameters": {**LINEAR, "rope_theta": 3e4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["GemmaConfig", "Gemma2Config", "VaultGemmaConfig"])
def test_all_layers_share_the_rotary_parameters_of_the_reference(name: str, change: dict) -> None:
    """But in Gemma 3, whose sliding layers have their own."""
    config_class = getattr(transformers, name)
    theirs = config_class(**change).rope_parameters
    raw = {**GEMMA_2B, "model_type": config_class.model_type, "sliding_window": 64, **change}
    raw.pop("rope_theta" if "rope_theta" not in change else "", None)
    config = GemmaConfig.from_hf(raw)
    for kind in config.groups:
        factor = theirs["factor"] if theirs["rope_type"] == "linear" else 1.0
        expected = RopeParameters(rope_theta=theirs["rope_theta"], factor=factor)
        assert config.rope(kind) == expected
    assert config.groups == ((FULL,) if name == "GemmaConfig" else (SLIDING, FULL))


def test_keys_of_libraries_change_nothing() -> None:
    """As mirrors, older releases of transformers and Unsloth write them."""
    written = {
        "unsloth_fixed": True, "unsloth_version": "2025.3.9", "auto_map": {"AutoModel": "x.Y"},
        "pruned_heads": {}, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
        "do_sample": False, "_attn_implementation_autoset": True, "tokenizer_class": None,
    }  # fmt: skip
    assert GemmaConfig.from_hf(GEMMA3_4B_TEXT | written) == GemmaConfig.from_hf(GEMMA3_4B_TEXT)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("slidin_window", "sliding_window"),
        ("max_position_embedding", "max_position_embeddings"),
        ("final_logit_softcaping", "final_logit_softcapping"),
        ("unslothed", None),
        ("max_lenght", "max_length"),
    ],
)
def test_what_is_near_a_known_key_is_refused(key: str, nearest: str | None) -> None:
    hint = f"; did you mean {nearest}" if nearest else ""
    with pytest.raises(ConfigError, match=f"the key '{key}' is not known{re.escape(hint)}"):
        GemmaConfig.from_hf(GEMMA3_4B_TEXT | {key: 1})


def test_a_missing_key_is_named() -> None:
    raw = {k: v for k, v in GEMMA3_4B_TEXT.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="expected the key 'hidden_size'"):
        GemmaConfig.from_hf(raw)


RECURRENT_SIZES = {"lru_width", "conv1d_width"}
"""Sizes that only a RecurrentGemma has."""
NONSENSE: tuple[object, ...] = (
    0, -1, 1 << 40, True, 2.0, float("nan"), float("inf"), "48", None, [48], {"a": 1}, 10**400,
)  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("name", sorted({*MAX_SIZES} - {*NEWER_SIZES} - RECURRENT_SIZES))
def test_a_size_is_a_whole_number_within_limits(name: str, value: object) -> None:
    if (name, value) == ("sliding_window", None):
        pytest.skip("a model of full layers has none")
    with pytest.raises(ConfigError, match=rf"^{name}: expected a whole number from 1 to"):
        GemmaConfig.from_hf({**GEMMA3_4B_TEXT, name: value})


@pytest.mark.parametrize(
    "value", [0, -1.0, True, float("nan"), float("inf"), 1e300, 10**400, "1", None, [], {}],
    ids=lambda value: str(value)[:10],
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["query_pre_attn_scalar", "rms_norm_eps", "rope_theta", "rope_local_base_freq"]
)
def test_a_factor_is_a_number_within_limits(name: str, value: object) -> None:
    raw = {key: v for key, v in GEMMA3_4B_TEXT.items() if key != "rope_scaling"}
    with pytest.raises(ConfigError, match="expected a number above 0 and below 1e"):
        GemmaConfig.from_hf({**raw, name: value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": ["gemma"]}, "model_type: expected one of"),
        ({"model_type": None}, "got None"),
        ({"head_dim": 255}, "head_dim: expected an even number, got 255"),
        ({"layer_types": 34}, "layer_types: expected a list of"),
        ({"layer_types": [1] * 34}, "layer_types: expected a list of"),
        ({"layer_types": ["x"] * 34}, "layer_types: expected a list of .* got "),
        ({"sliding_window_pattern": -6}, "sliding_window_pattern: expected a whole number"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern: expected a whole number"),
        ({"rope_scaling": []}, r"rope_scaling: expected a dictionary, got \[\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of full_attention: exp"),
        ({"rope_scaling": {"rope_type": []}}, r"expected default or linear, got \[\]"),
        ({"rope_parameters": "x", "rope_scaling": None}, "rope_parameters: expected a dictionary"),
        (
            {"rope_parameters": {SLIDING: 1}, "rope_scaling": None},
            "sliding_attention: expected a dictionary, got 1",
        ),
        (
            {"rope_parameters": {FULL: {}}, "rope_scaling": None},
            "sliding_attention: expected rope_theta|full_attention:",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
        ({"use_bidirectional_attention": "no"}, "expected true or false, got 'no'"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping: expected a number"),
        ({"hidden_activation": [[]] * 99}, "hidden_activation: expected one of"),
        ({"x" * 10_000: 1}, r"the key 'x+\.\.\.x+' is not known"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_setting_of_another_kind_is_refused(change: dict, sentence: str) -> None:
    raw = {**GEMMA3_4B_TEXT, **change}
    with pytest.raises(ConfigError, match=sentence) as raised:
        GemmaConfig.from_hf(raw)
    assert len(str(raised.value)) < 500
