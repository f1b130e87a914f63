"""Reading checkpoints: every tensor has a place, and what has none is named."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.tokenizer import ModelProto, Tokenizer
from export.__main__ import export
from export.checkpoints.hf_folder import check_names, read_checkpoint, read_safetensors
from tests.conftest import TinyModel
from tests.doubles.reference import MODELS, SHAPE


@pytest.fixture
def folder(tiny_gemma3: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_gemma3.checkpoint.path, tmp_path / "checkpoint"))


def shard(folder: Path, num_shards: int) -> None:
    """Split a checkpoint as large models are."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(num_shards):
        part = dict(list(tensors.items())[i::num_shards])
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        safetensors.torch.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_checkpoint(tiny_gemma3: TinyModel, folder: Path) -> None:
    shard(folder, 3)
    tensors = read_checkpoint(folder).tensors
    assert tensors.keys() == tiny_gemma3.checkpoint.tensors.keys()
    for name, stored in tensors.items():
        expected = tiny_gemma3.checkpoint.tensors[name]
        np.testing.assert_array_equal(
            np.concatenate(list(stored.chunks())), np.concatenate(list(expected.chunks()))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_from_where_the_header_says(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = {"a": torch.randn(5, 3).to(dtype), "b": torch.randn(7).to(dtype)}
    safetensors.torch.save_file(expected, tmp_path / "x.safetensors")
    for stored in read_safetensors(tmp_path / "x.safetensors"):
        values = np.concatenate(list(stored.chunks())).astype(np.float32)
        np.testing.assert_array_equal(values, expected[stored.name].float().numpy())
        assert stored.raw is not None
        raw = (tmp_path / "x.safetensors").read_bytes()
        content = raw[stored.raw.offset : stored.raw.offset + stored.raw.length]
        assert content == expected[stored.name].view(torch.uint8).numpy().tobytes()


def test_a_tensor_without_a_place_is_named(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop(
        "model.layers.0.self_attn.q_proj.weight"
    )
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    found = read_checkpoint(folder).tensors
    expected = {n: s.shape for n, s in found.items() if "q_prj" not in n}
    with pytest.raises(CheckpointError, match=r"q_prj.* has no place .*; did you mean .*q_proj"):
        check_names(found, expected)
    expected["layers.0.self_attn.q_proj.weight"] = (1024, 48)
    with pytest.raises(CheckpointError, match=r"expected the tensor .*q_proj.*did you mean .*prj"):
        check_names(found, expected)


def test_a_tensor_of_another_shape_is_named(tiny_gemma3: TinyModel) -> None:
    found = tiny_gemma3.checkpoint.tensors
    expected = {name: stored.shape for name, stored in found.items()} | {"norm.weight": (7,)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of shape \[7\].*got \[48\]"):
        check_names(found, expected)


def test_a_cut_shard_is_found(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file ends inside the tensor"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 1 << 60) + b"{}"])
def test_another_file_is_no_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="expected a safetensors header"):
        read_checkpoint(folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got nothing"):
        read_checkpoint(folder / "none")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model: expected the SentencePiece model"
    ):
        read_checkpoint(folder).tokenizer_model()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a safetensors file"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        read_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="got 'llama'"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "model_type", ["gemma3n", "gemma4", "recurrent_gemma", "t5gemma", "paligemma", "shieldgemma2"]
)
def test_another_architecture_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, model_type: str
) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        ConfigError, match=rf"expected one of gemma, gemma2, .*, got '{model_type}'"
    ):
        export(folder, tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


@pytest.mark.parametrize("has_images", [True, False])
def test_an_unknown_key_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, *, has_images: bool
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    if has_images:
        raw = {"model_type": "gemma3", "text_config": raw}
    raw["quantization_config"] = {"bits": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="the key 'quantization_config' is not known"):
        export(folder, tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


def test_what_travels_with_the_weights(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "LICENSE").write_text("terms")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.eos_token_ids == (1, 106)
    assert checkpoint.chat_template == "{{ messages }}"
    assert [file.name for file in checkpoint.legal_files] == ["LICENSE"]


@pytest.mark.parametrize("layout", ["as saved", "language_model.model.", "model.language_model."])
def test_gemma_3_with_images_gives_its_text_model(
    tiny_gemma3: TinyModel, tmp_path: Path, layout: str
) -> None:
    """The published 4B to 27B, under the names of older files and of newer ones."""
    text = transformers.Gemma3TextConfig(**SHAPE, **MODELS["gemma3_text"])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 7}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(tiny_gemma3.reference.model.state_dict())
    model.save_pretrained(tmp_path)
    if layout != "as saved":
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        renamed = {rename(name, layout): tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config == tiny_gemma3.checkpoint.config
    assert checkpoint.tensors.keys() == tiny_gemma3.checkpoint.tensors.keys()
    for name, stored in checkpoint.tensors.items():
        expected = tiny_gemma3.checkpoint.tensors[name]
        np.testing.assert_array_equal(stored.rows(0, 3), expected.rows(0, 3))


def rename(name: str, layout: str) -> str:
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return layout + name.removeprefix(prefix)
    return name


def test_published_gemma_3_configs_name_few_sizes(folder: Path) -> None:
    """The 4B's text_config as published; the rest are defaults of transformers 4.50."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024}  # fmt: skip
    raw = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {},
        "eos_token_id": [1, 106],
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").unlink()
    checkpoint = read_checkpoint(folder)
    config = checkpoint.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    assert config.rope("full_attention").factor == 8.0
    assert checkpoint.eos_token_ids == (1, 106)


def test_pieces_have_the_names_that_the_tokenizer_config_gives_them(folder: Path) -> None:
    """As CodeGemma names some that were unused; what has a name in the model keeps it."""
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.pieces[9].piece = "<unused3>"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    names = {"9": "<|fim_prefix|>", "4": "<other>", "262144": "<image_soft_token>"}
    added = {token_id: {"content": name} for token_id, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    control_pieces = Tokenizer(read_checkpoint(folder).tokenizer_model()).control_pieces
    assert control_pieces["<|fim_prefix|>"] == 9
    assert control_pieces["<start_of_turn>"] == 4
