"""Reading config.json: published spellings, defaults, and refusals."""

import pytest
import transformers

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import FULL, SLIDING, GemmaConfig

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
        ({"model_type": "gemma4"}, "gemma, gemma2, gemma3_text, vaultgemma, got 'gemma4'"),
        ({"hidden_activation": "relu"}, "hidden_activation: expected one of"),
        ({"use_bidirectional_attention": True, "sliding_window": 257}, "even number .* put 512"),
        ({"use_bidirectional_attention": True, "model_type": "gemma2"}, "expected false in a gem"),
        ({"num_attention_heads": 7}, "expected a multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "expected 34 entries"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "expected default or linear"),
        ({"tie_word_embeddings": False}, "expected true for a Gemma model"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GemmaConfig.from_hf({**GEMMA3_4B_TEXT, **change})


def test_a_missing_key_is_named() -> None:
    raw = {k: v for k, v in GEMMA3_4B_TEXT.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="expected the key 'hidden_size'"):
        GemmaConfig.from_hf(raw)
