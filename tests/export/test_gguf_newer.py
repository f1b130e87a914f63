"""Reading GGUF of newer Gemmas: files written as llama.cpp's converter does, against the models."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.tokenizer import ModelProto, Tokenizer
from export.checkpoints import gguf_newer
from export.checkpoints.gguf_header import read_gguf_header
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.sidecar_files import tokenizer_bytes
from tests.doubles.checkpoint_files import values
from tests.doubles.gemma4_tokenizer import write_tokenizer
from tests.doubles.gguf_models import MODELS, newer_model, write_model
from tests.doubles.reference import FULL, SLIDING, save_checkpoint

Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


def write(folder: Path, name: str, **options: Any) -> Path:
    return write_model(folder / "x.gguf", newer_model(name), MODELS[name], **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_says_what_the_folder_of_the_model_says(tmp_path: Path, name: str) -> None:
    expected = read_checkpoint(save_checkpoint(newer_model(name), tmp_path / "folder"))
    found = read_checkpoint(write(tmp_path, name))
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    check_names(found.tensors, expected_shapes(found))
    for tensor, stored in found.tensors.items():
        # Plain weights of norms too: both formats have the effective ones.
        np.testing.assert_array_equal(values(stored), values(expected.tensors[tensor]), tensor)
        assert stored.raw is not None
    assert expected.norm_offset == found.norm_offset == 0


@pytest.mark.parametrize("name", ["E2B", "26B-A4B", "3n"])
@pytest.mark.parametrize("kind", [Q4, Q8], ids=lambda kind: kind.name)
def test_codes_of_all_matrices_are_those_of_the_file(
    tmp_path: Path, name: str, kind: GGMLQuantizationType
) -> None:
    """Experts, per-layer tables and stacked projections too."""
    model = newer_model(name)
    path = write_model(tmp_path / "x.gguf", model, MODELS[name], kind=kind)
    tensors = read_checkpoint(path).tensors
    packed = 0
    for full, parameter in model.named_parameters():
        stored = tensors[full.removeprefix("model.")]
        if parameter.ndim < 2 or parameter.shape[-1] % 32:
            continue
        blocks = quantize(parameter.detach().numpy(), kind)
        np.testing.assert_array_equal(values(stored), dequantize(blocks, kind), full)
        np.testing.assert_array_equal(coded(stored, kind), blocks.reshape(len(blocks), -1), full)
        packed += 1
    assert packed >= 50


def coded(stored: Any, kind: GGMLQuantizationType) -> np.ndarray:
    """Return a tensor's packed bytes, row by row."""
    assert (stored.dtype, stored.raw) == (kind.name, None)
    return np.concatenate([stored.coded_rows(i, i + 1) for i in range(stored.shape[0])])


def test_halves_of_experts_may_be_apart(tmp_path: Path) -> None:
    model = newer_model("26B-A4B")
    state = {n: p.detach().numpy() for n, p in model.named_parameters() if "gate_up" in n}
    for kind in (None, Q4):
        halves: dict[str, np.ndarray | None] = {}
        for i in range(6):
            both = state[f"model.layers.{i}.experts.gate_up_proj"]
            halves[f"blk.{i}.ffn_gate_up_exps.weight"] = None
            halves[f"blk.{i}.ffn_gate_exps.weight"] = both[:, :32]
            halves[f"blk.{i}.ffn_up_exps.weight"] = both[:, 32:]
        apart = write_model(tmp_path / "apart.gguf", model, MODELS["26B-A4B"], tensors=halves,
                            kind=kind)  # fmt: skip
        whole = write_model(tmp_path / "whole.gguf", model, MODELS["26B-A4B"], kind=kind)
        found, expected = read_checkpoint(apart), read_checkpoint(whole)
        assert found.tensors.keys() == expected.tensors.keys()
        name = "layers.3.experts.gate_up_proj"
        one, other = found.tensors[name], expected.tensors[name]
        np.testing.assert_array_equal(values(one), values(other))
        np.testing.assert_array_equal(one.rows(2, 4), other.rows(2, 4))
        if kind is not None:
            np.testing.assert_array_equal(coded(one, kind), coded(other, kind))


@pytest.mark.parametrize("name", ["E2B", "3n"])
def test_keys_and_values_that_no_layer_reads_are_left_out(tmp_path: Path, name: str) -> None:
    """Files from before layers shared them in transformers have some in every layer."""
    matrices = {
        f"blk.{i}.{part}.weight": np.ones((16, 64), np.float32)
        for i in (3, 4, 5)
        for part in ("attn_k", "attn_v")
    }
    norms = {f"blk.{i}.attn_k_norm.weight": np.ones(16, np.float32) for i in (3, 4, 5)}
    expected = read_checkpoint(write(tmp_path, name)).tensors
    assert read_checkpoint(write(tmp_path, name, tensors=matrices | norms)).tensors.keys() == (
        expected.keys()
    )


def test_rows_that_a_converter_adds_to_a_per_layer_table_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_newer, "PER_LAYER_ROWS", 280)
    table = newer_model("3n").model.embed_tokens_per_layer.weight.detach().numpy()
    rows = np.concatenate([table, np.zeros((20, table.shape[1]), np.float32)])
    for kind in (None, Q4):
        name = "per_layer_token_embd.weight"
        checkpoint = read_checkpoint(write(tmp_path, "3n", tensors={name: rows}, kind=kind))
        assert checkpoint.config.vocab_size_per_layer_input == 280
        found = values(checkpoint.tensors["embed_tokens_per_layer.weight"])
        np.testing.assert_array_equal(
            found, table if kind is None else dequantize(quantize(table, kind), kind)
        )
    rows[299, 3] = 1
    checkpoint = read_checkpoint(write(tmp_path, "3n", tensors={name: rows}))
    assert checkpoint.config.vocab_size_per_layer_input == 300


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("E2B", {"rope.scaling.type": "linear"}, "rope.scaling.type as none, got 'linear'"),
        ("E2B", {"rope.scaling.factor": 8.0}, "rope.scaling.factor as 1.0, got 8.0"),
        ("E2B", {"rope.dimension_count": 16}, "rope.dimension_count as 32, got 16"),
        ("E2B", {"rope.dimension_count_swa": 32}, "rope.dimension_count_swa as 16, got 32"),
        ("E2B", {"attention.value_length": 16}, "attention.value_length as 32, got 16"),
        ("E2B", {"attention.key_length_swa": None}, "expected the key gemma4.attention.key_len"),
        ("E2B", {"attention.causal": False}, "attention.causal as True, got False"),
        ("E2B", {"attention.shared_kv_layers": 6}, "num_kv_shared_layers: expected fewer than"),
        ("E2B", {"attention.shared_kv_layers": -1}, "expected a whole number from 1"),
        ("E2B", {"attention.shared_kv_layers": True}, "expected a whole number from 1"),
        ("E2B", {"feed_forward_length": [96] * 5}, "expected one number, or 6"),
        ("E2B", {"expert_shared_count": 1}, "the key 'gemma4.expert_shared_count' is not known"),
        ("E2B", {"sliding_window_pattern": 6}, "did you mean attention.sliding_window_pattern?"),
        ("31B", {"attention.head_count_kv": [2] * 5}, "one number for each type of the 6 layers"),
        ("31B", {"attention.head_count_kv": [2, 1, 1, 2, 2, 1]}, "got [2, 1, 1, 2, 2, 1]"),
        ("26B-A4B", {"expert_used_count": 9}, "top_k_experts: expected 1 to 6 (num_experts)"),
        ("26B-A4B", {"expert_feed_forward_length": None}, "expected the key gemma4.expert_feed"),
        ("3n", {"attention.shared_kv_layers": None}, "expected the key gemma3n.attention.shared"),
        ("3n", {"altup.num_inputs": None}, "expected the key gemma3n.altup.num_inputs"),
        ("3n", {"altup.active_idx": 4}, "altup_active_idx: expected 0 to 3, got 4"),
        ("3n", {"activation_sparsity_scale": [1.6] * 5}, "expected 6 entries"),
        ("3n", {"activation_sparsity_scale": [math.nan] * 6}, "as a list of numbers"),
        ("3n", {"activation_sparsity_scale": [9.0] * 6}, "shares from 0 to below 1, got [1.0"),
        ("3n", {"rope.dimension_count": 32}, "rope.dimension_count as 16, got 32"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_computed_is_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path, name, settings=settings)
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        read_checkpoint(path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("share", [0.95, 0.123456, 0.0])
def test_shares_of_cut_gates_are_those_that_the_file_stands_for(
    tmp_path: Path, share: float
) -> None:
    scale = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(share)))
    settings = {"activation_sparsity_scale": [scale] * 6}
    config = read_checkpoint(write(tmp_path, "3n", settings=settings)).config
    # float32, unless a number of few decimals is as near.
    tolerance = 2e-7 if share == 0.123456 else 0
    assert config.activation_sparsity_pattern == pytest.approx([share] * 6, rel=0, abs=tolerance)


def freqs(*numbers: float) -> np.ndarray:
    return np.array([*numbers, *[1e30] * (16 - len(numbers))], np.float32)


@pytest.mark.parametrize(
    "divisors",
    [None, freqs(1, 1)[:8], freqs(), freqs(1, 2), freqs(1, 1e30, 1), freqs(1, math.nan)],
    ids=str,
)
def test_another_rotary_embedding_of_full_layers_is_refused(
    tmp_path: Path, divisors: np.ndarray | None
) -> None:
    path = write(tmp_path, "31B", tensors={"rope_freqs.weight": divisors})
    with pytest.raises(CheckpointError, match=r"expected (the tensor )?rope_freqs\.weight"):
        read_checkpoint(path)


def test_the_share_of_frequencies_that_turn_is_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, "31B", tensors={"rope_freqs.weight": freqs(1, 1)})
    config = read_checkpoint(path).config
    assert config.rope(FULL).partial_rotary_factor == 2 / 16
    assert config.rope(SLIDING).partial_rotary_factor == 1


def test_one_full_layer_without_values_of_its_own_is_named(tmp_path: Path) -> None:
    """Values are keys in all full layers or in none."""
    checkpoint = read_checkpoint(write(tmp_path, "E2B", tensors={"blk.2.attn_v.weight": None}))
    assert checkpoint.config.attention_k_eq_v
    values = np.ones((32, 64), np.float32)
    checkpoint = read_checkpoint(write(tmp_path, "31B", tensors={"blk.2.attn_v.weight": values}))
    assert not checkpoint.config.attention_k_eq_v
    with pytest.raises(CheckpointError, match=r"the tensor layers\.5\.self_attn\.v_proj\.weight"):
        check_names(checkpoint.tensors, expected_shapes(checkpoint))


def test_older_files_say_less(tmp_path: Path) -> None:
    settings = {
        "final_logit_softcapping": None,
        "rope.freq_base": None,
        "rope.freq_base_swa": None,
        "attention.sliding_window_pattern": 3,
    }
    config = read_checkpoint(write(tmp_path, "3n", settings=settings)).config
    assert config.final_logit_softcapping == 30
    assert [config.rope(kind).rope_theta for kind in (SLIDING, FULL)] == [1e4, 1e6]
    assert config.layer_types == tuple(MODELS["3n"]["layer_types"])
    settings |= {"attention.sliding_window_pattern": None, "attention.shared_kv_layers": 1}
    config = read_checkpoint(write(tmp_path, "3n", settings=settings)).config
    assert config.layer_types == (*[SLIDING] * 4, FULL, SLIDING)
    with pytest.raises(CheckpointError, match="pattern as true or false for 6 layers, got None"):
        read_checkpoint(write(tmp_path, "E2B", settings=settings))


def test_the_vocabulary_of_a_gemma_4_is_that_of_its_folder(tmp_path: Path) -> None:
    """The file has pairs of pieces, and scores that say nothing."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    raw = MODELS["E2B"] | {"vocab_size": 400}
    table = np.zeros((400, 64), np.float32)
    path = write_model(tmp_path / "x.gguf", newer_model("E2B"), raw, vocabulary=tmp_path,
                       tensors={"token_embd.weight": table})  # fmt: skip
    file = read_gguf_header(path)
    assert set(file.values["tokenizer.ggml.scores"]) == {-1000.0}
    found = read_checkpoint(path)
    theirs, ours = (
        ModelProto.FromString(proto).pieces
        for proto in (tokenizer_bytes(tmp_path, 400), found.tokenizer_model())
    )
    assert [(p.piece, p.type, p.score) for p in ours] == [
        (p.piece, p.type, p.score) for p in theirs
    ]
    pieces = Tokenizer(found.tokenizer_model()).control_pieces
    ends = ("<eos>", "<turn|>", "<|tool_response>")
    assert found.eos_token_ids == tuple(sorted(pieces[piece] for piece in ends))
    broken = write_model(tmp_path / "y.gguf", newer_model("E2B"), raw, vocabulary=tmp_path,
                         settings={"tokenizer.ggml.merges": ["t h"]})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"y\.gguf: .* convert the model again with llama"):
        read_checkpoint(broken).tokenizer_model()
