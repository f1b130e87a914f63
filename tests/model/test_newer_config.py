"""Reading the config.json of Gemma 3n, Gemma 4 and EmbeddingGemma 2: files, defaults, refusals."""

from typing import Any

import pytest
import transformers

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.newer_config import is_newer, newer_config

ROPE = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
}
E2B: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False,
    "bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1536,
    "hidden_size_per_layer_input": 256, "initializer_range": 0.02, "intermediate_size": 6144,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7, "max_position_embeddings": 131072,
    "model_type": "gemma4_text", "moe_intermediate_size": None, "num_attention_heads": 8,
    "num_experts": None, "num_global_key_value_heads": None, "num_hidden_layers": 35,
    "num_key_value_heads": 1, "num_kv_shared_layers": 20, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_parameters": ROPE, "sliding_window": 512,
    "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
    "use_cache": True, "use_double_wide_mlp": True, "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}  # fmt: skip
UNIFIED_12B: dict[str, Any] = {
    **E2B, "attention_k_eq_v": True, "hidden_size": 3840, "hidden_size_per_layer_input": 0,
    "intermediate_size": 15360, "layer_types": ([SLIDING] * 5 + [FULL]) * 8,
    "max_position_embeddings": 262144, "model_type": "gemma4_unified_text",
    "num_attention_heads": 16, "num_global_key_value_heads": 1, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "num_kv_shared_layers": 0, "sliding_window": 1024,
    "use_bidirectional_attention": "vision", "use_double_wide_mlp": False,
}  # fmt: skip
MOE_26B: dict[str, Any] = {
    **UNIFIED_12B, "model_type": "gemma4_text", "hidden_size": 2816, "intermediate_size": 2112,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 5, "num_hidden_layers": 30,
    "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128,
    "top_k_experts": 8, "moe_intermediate_size": 704,
}  # fmt: skip
"""The text_config of published files."""
CLASSES = {
    "gemma3n_text": transformers.Gemma3nTextConfig,
    "gemma4_text": transformers.Gemma4TextConfig,
    "gemma4_unified_text": transformers.Gemma4UnifiedTextConfig,
    "embedding_gemma2_text": transformers.EmbeddingGemma2TextConfig,
}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
          "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip


def test_e2b_has_layers_of_two_kinds_and_widths() -> None:
    config = newer_config(E2B)
    assert config.groups == (SLIDING, FULL)
    assert [config.head_dim_of(group) for group in config.groups] == [256, 512]
    assert [config.num_kv_heads_of(group) for group in config.groups] == [1, 1]
    assert config.first_shared_layer == 15
    assert config.cached_layers_of(FULL) == (4, 9, 14)
    assert {config.producer(i) for i in range(15, 35)} == {13, 14}
    assert [config.producer(i) for i in (13, 14, 15, 19)] == [13, 14, 13, 14]
    assert [config.intermediate_size_of(i) for i in (0, 14, 15, 34)] == [6144, 6144, 12288, 12288]
    assert config.hidden_size_per_layer_input == 256
    assert config.rope(FULL).partial_rotary_factor == 0.25
    assert config.rope(SLIDING).partial_rotary_factor == 1.0
    assert config.attention_scale == 1.0
    assert config.norm_offset == 0.0
    assert config.num_experts is None


def test_the_12b_has_keys_for_values_and_no_per_layer_embeddings() -> None:
    outer = {
        "model_type": "gemma4_unified", "text_config": UNIFIED_12B, "audio_token_id": 258881,
        "vision_config": {"model_type": "gemma4_unified_vision"},
    }  # fmt: skip
    config = newer_config(outer)
    assert config == newer_config(UNIFIED_12B)
    assert config.model_type == "gemma4_text"
    assert config.attention_k_eq_v
    assert [config.num_kv_heads_of(group) for group in (SLIDING, FULL)] == [8, 1]
    assert config.hidden_size_per_layer_input is None
    assert config.vocab_size_per_layer_input is None
    assert config.first_shared_layer == config.num_hidden_layers
    assert config.intermediate_sizes == ()


def test_the_26b_has_experts() -> None:
    config = newer_config(MOE_26B)
    assert (config.num_experts, config.top_k_experts) == (128, 8)
    assert (config.intermediate_size, config.moe_intermediate_size) == (2112, 704)
    assert newer_config({**MOE_26B, "enable_moe_block": False}).num_experts is None


@pytest.mark.parametrize("raw", [E2B, UNIFIED_12B, MOE_26B], ids=["E2B", "12B", "26B"])
def test_what_transformers_writes_today_reads_the_same(raw: dict[str, Any]) -> None:
    """It writes the sizes of full layers by their numbers, in `per_layer_config`."""
    loaded = CLASSES[raw["model_type"]](**raw).to_dict()
    assert "per_layer_config" in loaded
    assert "global_head_dim" not in loaded
    assert newer_config(loaded) == newer_config(raw)


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_file_omits_is_as_in_the_class(model_type: str) -> None:
    theirs = CLASSES[model_type]()
    local = theirs if model_type == "gemma3n_text" else theirs.per_layer_config[0]
    raw = {key: getattr(local, key) for key in NEEDED}
    config = newer_config({"model_type": model_type, **raw})
    full = theirs.layer_types.index(FULL)
    assert list(config.layer_types) == theirs.layer_types
    assert config.head_dim == local.head_dim
    assert config.sliding_window == theirs.sliding_window
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.final_logit_softcapping == getattr(theirs, "final_logit_softcapping", None)
    assert config.num_kv_shared_layers == getattr(theirs, "num_kv_shared_layers", 0)
    for kind in (FULL, SLIDING):
        rope = theirs.rope_parameters[kind]
        assert config.rope(kind).rope_theta == rope["rope_theta"]
        assert config.rope(kind).partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    width = getattr(theirs, "hidden_size_per_layer_input", 0)
    assert (config.hidden_size_per_layer_input or 0) == width
    if model_type != "gemma3n_text":
        layer = theirs.per_layer_config[full]
        assert config.head_dim_of(FULL) == layer.head_dim
        assert config.num_kv_heads_of(FULL) == layer.num_key_value_heads


def test_the_last_layer_of_a_gemma4_is_full_whatever_its_file_says() -> None:
    types = [FULL, SLIDING, SLIDING]
    raw = {**UNIFIED_12B, "num_hidden_layers": 3, "layer_types": types}
    assert newer_config(raw).layer_types == (FULL, SLIDING, FULL)
    theirs = transformers.Gemma4UnifiedTextConfig(**raw)
    assert tuple(theirs.layer_types) == (FULL, SLIDING, FULL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attn_logit_softcapping": 50.0}, "the key 'attn_logit_softcapping' is not known"),
        ({"num_expert": 2}, "the key 'num_expert' is not known; did you mean num_experts"),
        ({"attention_bias": True}, "attention_bias: expected one of"),
        ({"hidden_activation": "silu"}, "hidden_activation: expected"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: expected one of"),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers: expected fewer than"),
        ({"num_kv_shared_layers": 31}, "with a layer of each type before them, got 31"),
        ({"num_kv_shared_layers": -1}, "expected a whole number from 1"),
        ({"global_head_dim": 511}, "and an even head size, got 1 and 511"),
        ({"intermediate_size": [6144] * 34}, "intermediate_size: expected one number, or 35"),
        ({"layer_types": [SLIDING] * 34}, "layer_types: expected 35 entries"),
        ({"layer_types": ["chunked_attention"] * 35}, "layer_types: expected a list of"),
        ({"hidden_size_per_layer_input": 1.5}, "hidden_size_per_layer_input: expected a whole"),
        ({"enable_moe_block": True}, "num_experts: expected a number beside enable_moe_block"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected true"),
        ({"rope_parameters": {"global": {}}}, "rope_parameters: expected full_attention and"),
        (
            {"rope_parameters": {**ROPE, FULL: {"rope_type": "yarn", "rope_theta": 1e6}}},
            "rope_type of full_attention: expected default or linear or proportional",
        ),
        (
            {"rope_parameters": {**ROPE, SLIDING: {**ROPE[SLIDING], "partial_rotary_factor": 0.5}}},
            "partial_rotary_factor of sliding_attention: expected none beside",
        ),
        ({"per_layer_config": {"4": {"head_dim": 512}}}, "global_head_dim: expected none beside"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        newer_config({**E2B, **change})


@pytest.mark.parametrize(
    "saved",
    [
        {"4": {"head_dim": 512}},
        {str(i): {"head_dim": 512 + i} for i in range(4, 35, 5)},
        {str(i): {"head_dim": 512, "hidden_size": 9} for i in range(4, 35, 5)},
        {str(i): {"head_dim": 512} for i in range(35)},
    ],
    ids=["one layer", "sizes of their own", "another key", "layers with a window"],
)
def test_sizes_by_layer_are_those_of_all_full_layers(saved: dict[str, Any]) -> None:
    raw = {key: value for key, value in E2B.items() if "global" not in key}
    with pytest.raises(ConfigError, match="per_layer_config: expected the same head_dim"):
        newer_config({**raw, "per_layer_config": saved})


@pytest.mark.parametrize(
    ("outer", "sentence"),
    [
        ({"model_type": "gemma4"}, "text_config: expected a dictionary, got None"),
        (
            {"model_type": "gemma4", "text_config": {**E2B, "model_type": "gemma3_text"}},
            "model_type: expected gemma4_text, got 'gemma3_text'",
        ),
        (
            {"model_type": "gemma4_unified", "text_config": E2B},
            "model_type: expected gemma4_unified_text, got 'gemma4_text'",
        ),
    ],
)
def test_a_section_is_the_text_model_of_its_file(outer: dict[str, Any], sentence: str) -> None:
    assert is_newer(outer)
    with pytest.raises(ConfigError, match=sentence):
        newer_config(outer)


def test_a_section_may_omit_its_kind() -> None:
    text = {key: value for key, value in E2B.items() if key != "model_type"}
    assert newer_config({"model_type": "gemma4", "text_config": text}) == newer_config(E2B)
    assert not is_newer({"model_type": "gemma3_text"})
    assert isinstance(newer_config(E2B), GemmaConfig)
