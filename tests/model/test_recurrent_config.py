"""Reading the config.json of a RecurrentGemma: published spellings, defaults, and refusals."""

import pytest
import transformers

from beam_gemma.errors import ConfigError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.config_reader import MAX_SIZES, NEWER_SIZES
from beam_gemma.model.layer_types import RECURRENT, SLIDING
from beam_gemma.model.recurrent_config import WINDOW_KEYS, recurrent_config
from tests.model.test_config import NONSENSE

PUBLISHED = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attention_window_size": 2048,
    "block_types": ["recurrent", "recurrent", "attention"], "bos_token_id": 2, "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True, "eos_token_id": 1,
    "final_w_init_variance_scale": 0.07692307692307693, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2560, "intermediate_size": 15360,
    "logits_soft_cap": 30.0, "lru_width": 2560, "model_type": "recurrent_gemma",
    "num_attention_heads": 10, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "vocab_size": 256000, "w_init_variance_scale": 0.01,
}  # fmt: skip


def test_two_recurrent_blocks_and_one_of_attention_take_turns() -> None:
    config = recurrent_config(PUBLISHED)
    assert config.layer_types[:4] == (RECURRENT, RECURRENT, SLIDING, RECURRENT)
    assert config.layers_of(SLIDING) == (2, 5, 8, 11, 14, 17, 20, 23)
    assert config.groups == (SLIDING,)
    assert config.is_recurrent


def test_sizes_are_those_of_the_original() -> None:
    """The file's window is a distance, and its feed-forward both branches together."""
    config = recurrent_config(PUBLISHED)
    assert config.window(SLIDING) == 2049
    assert config.intermediate_size == 7680
    assert (config.lru_width, config.conv1d_width, config.rotary_dim_of(SLIDING)) == (2560, 4, 128)
    assert config.attention_scale == 256**-0.5
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (30.0, None)
    assert not config.has_post_norms
    assert not config.has_qk_norm


def test_what_transformers_writes_today_reads_the_same() -> None:
    loaded = transformers.RecurrentGemmaConfig(**PUBLISHED)
    assert recurrent_config(loaded.to_dict()) == recurrent_config(PUBLISHED)


def test_what_a_file_omits_is_as_in_the_class() -> None:
    """In which a missing number of key-value heads is that of the heads."""
    needed = ("model_type", "vocab_size", "num_hidden_layers", "hidden_size",
              "intermediate_size", "num_attention_heads")  # fmt: skip
    config = recurrent_config({key: PUBLISHED[key] for key in needed})
    theirs = transformers.RecurrentGemmaConfig()
    assert config.num_key_value_heads == theirs.num_key_value_heads == 10
    assert config.lru_width == theirs.lru_width
    assert config.head_dim == theirs.head_dim
    assert list(config.layer_types) == theirs.layers_block_type
    assert config.window(SLIDING) == theirs.attention_window_size + 1
    assert config.final_logit_softcapping == theirs.logits_soft_cap
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]


@pytest.mark.parametrize(
    "change",
    [
        {"_block_types": None},
        {"block_types": None},
        {"block_types": None, "_block_types": None},
        {"layers_block_type": [RECURRENT, RECURRENT, SLIDING] * 8 + [RECURRENT] * 2},
        {"layer_types": (["recurrent"] * 2 + ["attention"]) * 8 + ["recurrent"] * 2},
        {"sliding_window": 2048},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {}, "rope_scaling": None},
        {"lru_width": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_has_several_spellings(change: dict) -> None:
    assert recurrent_config(PUBLISHED | change) == recurrent_config(PUBLISHED)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attention_window": 1}, "'attention_window' is not known; did you mean attention_win"),
        ({"max_position_embeddings": 8192}, "'max_position_embeddings' is not known"),
        ({"model_type": "gemma"}, "model_type: expected one of"),
        ({"hidden_activation": None}, "hidden_activation: expected one of"),
        ({"attention_bias": True}, "attention_bias: expected one of"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim: expected one of"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected true"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap: expected a number above 0"),
        ({"intermediate_size": 15361}, "intermediate_size: expected an even number, got 15361"),
        ({"lru_width": 2561}, r"lru_width: expected a multiple of num_attention_heads \(10\), got"),
        ({"conv1d_width": 1}, "conv1d_width: expected at least 2, got 1"),
        ({"block_types": []}, r"block_types: expected a list of recurrent and attention, got \[\]"),
        ({"block_types": ["local"]}, r"block_types: expected a list .* got \['local'\]"),
        ({"_block_types": "recurrent"}, "_block_types: expected a list"),
        ({"_block_types": [["recurrent"]]}, "_block_types: expected a list"),
        ({"_block_types": ["recurrent"]}, "block_types and _block_types: expected the same layers"),
        ({"layer_types": [SLIDING]}, r"layer_types: expected 26 entries \(num_hidden_layers\), go"),
        ({"sliding_window": 2049}, "attention_window_size and sliding_window: expected one number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: expected one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected default, got 'yarn'"),
        ({"rope_parameters": {"rope_teta": 1.0}}, "'rope_teta' is not known; did you mean rope_th"),
        ({"rope_parameters": {"rope_theta": 2e4}}, "rope_theta: expected the same number in rope"),
        ({"rope_parameters": []}, "rope_parameters: expected a dictionary"),
        ({"rope_theta": 0}, "rope_theta: expected a number above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a share of head_dim"),
        ({"partial_rotary_factor": 0.005}, r"share of head_dim \(256\) that is an even number"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        recurrent_config({**PUBLISHED, **change})
    assert len(str(raised.value)) < 500


SIZES = sorted({*MAX_SIZES} - {*NEWER_SIZES} - {"max_position_embeddings"} | {*WINDOW_KEYS})
MAY_BE_NULL = {"num_key_value_heads", "lru_width", *WINDOW_KEYS}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in SIZES for v in NONSENSE if v is not None or n not in MAY_BE_NULL],
    ids=lambda value: str(value)[:10],
)
def test_a_size_is_a_whole_number_within_limits(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected a whole number from 1 to"):
        recurrent_config({**PUBLISHED, name: value})


def test_a_recurrent_layer_needs_its_sizes() -> None:
    """Also where a configuration comes from another place than a config.json."""
    config = recurrent_config(PUBLISHED)
    fields = {name: getattr(config, name) for name in GemmaConfig.__dataclass_fields__}
    with pytest.raises(ConfigError, match="lru_width: expected a multiple"):
        GemmaConfig(**{**fields, "lru_width": None})
    with pytest.raises(ConfigError, match="conv1d_width: expected at least 2, got None"):
        GemmaConfig(**{**fields, "conv1d_width": None})
