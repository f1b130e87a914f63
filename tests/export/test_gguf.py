"""Reading GGUF: files written from the tiny models say the same as their safetensors."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config import FULL, SLIDING
from export.checkpoints.gguf_file import LAYER_NAMES, MODEL_TYPES, NORM_NAMES, _eos_token_ids
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from tests.conftest import TinyModel

ARCHITECTURES = {model_type: arch for arch, model_type in MODEL_TYPES.items()}


def write_gguf(path: Path, checkpoint: Checkpoint, *, skip: str = "", rename: str = "") -> Path:
    """Write a checkpoint as llama.cpp's converter does: norms as 1 + w, matrices as F16 or F32."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope(FULL).rope_theta)
    writer.add_rope_scaling_factor(config.rope(FULL).factor)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping and config.final_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    theirs = {o: t for t, o in (LAYER_NAMES | NORM_NAMES[config.model_type]).items()}
    for name, stored in checkpoint.tensors.items():
        values = np.concatenate(list(stored.chunks()))
        if name == skip:
            continue
        stem = name.removesuffix(".weight")
        stem = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(stem, stem)
        if stem.startswith("layers."):
            _, index, part = stem.split(".", 2)
            stem = f"blk.{index}.{theirs[part]}"
        stem = "blk.0.odd" if name == rename else stem
        writer.add_tensor(f"{stem}.weight", values + 1 if name.endswith("norm.weight") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_says_what_the_safetensors_say(tiny: TinyModel, tmp_path: Path) -> None:
    expected = tiny.checkpoint
    if expected.config.model_type not in ARCHITECTURES:
        pytest.skip("GGUF knows no such architecture")
    found = read_checkpoint(write_gguf(tmp_path / "tiny.gguf", expected))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, stored in found.tensors.items():
        values = np.concatenate(list(stored.chunks())) - (1 if name.endswith("norm.weight") else 0)
        theirs = np.concatenate(list(expected.tensors[name].chunks()))
        # float32: 1 + w was rounded.
        np.testing.assert_allclose(values, theirs, rtol=0, atol=2.4e-7)
        assert stored.raw is not None
    config = found.config
    for field in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
                  "vocab_size", "sliding_window", "final_logit_softcapping"):  # fmt: skip
        assert getattr(config, field) == getattr(expected.config, field), field
    assert config.rope(FULL) == expected.config.rope(FULL)
    if config.model_type == "gemma3_text":
        assert (config.rope(SLIDING).rope_theta, config.rope(SLIDING).factor) == (1e4, 1.0)


@pytest.mark.parametrize(("name", "tolerance"), [("Q8_0", 0.02), ("Q4_0", 0.6)])
def test_quantized_blocks_are_decoded(tmp_path: Path, name: str, tolerance: float) -> None:
    """Q4_0 is what the releases trained for quantization hold."""
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "gemma3")
    rows = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(rows, kind)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind)
    for key, value in (("block_count", 6), ("context_length", 64), ("embedding_length", 64),
                       ("feed_forward_length", 64), ("attention.head_count", 1),
                       ("attention.head_count_kv", 1), ("attention.key_length", 64),
                       ("attention.sliding_window", 8)):  # fmt: skip
        writer.add_uint32(f"gemma3.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_checkpoint(tmp_path / "q.gguf").tensors["embed_tokens.weight"]
    assert (stored.shape, stored.dtype, stored.raw) == ((300, 64), name, None)
    np.testing.assert_array_equal(
        stored.rows(100, 200), gguf.quants.dequantize(packed, kind)[100:200]
    )
    # At most a step of the scale over values of up to 4: 0.03 in 8 bits, 0.5 in 4.
    np.testing.assert_allclose(stored.rows(0, 300), rows, rtol=0, atol=tolerance)


def test_a_tensor_without_a_place_keeps_its_name(tiny_gemma3: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "odd.gguf", tiny_gemma3.checkpoint, rename="layers.0.mlp.up_proj.weight"
    )
    tensors = read_checkpoint(path).tensors
    assert "blk.0.odd.weight" in tensors
    assert "layers.0.mlp.up_proj.weight" not in tensors


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"expected a GGUF of gemma, .* architecture 'llama'"):
        read_checkpoint(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1,)),
        ({"eos_token_id": 1, "chat_template": "{{ messages }}"}, (1, 3)),
        ({"eos_token_id": 3}, (1, 3)),
        ({"eos_token_id": 1, "eot_token_id": 2}, (1, 2)),
    ],
    ids=str,
)
def test_a_turn_ends_a_text_where_there_are_turns(
    tmp_path: Path, fields: dict[str, int | str], expected: tuple[int, ...]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "<eos>", "<bos>", "<end_of_turn>"])
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert _eos_token_ids(gguf.GGUFReader(tmp_path / "x.gguf")) == expected
