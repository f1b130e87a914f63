"""Merging LoRA adapters: what PEFT merges, bit for bit, and nothing that is more than a sum."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from beam_gemma.errors import CheckpointError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from export.__main__ import export
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.tensors import Checkpoint
from tests.conftest import TinyModel
from tests.doubles.checkpoint_files import values, write_gguf
from tests.doubles.reference import save_checkpoint, tiny_model

# Warned of for tied embeddings: a head that is no longer the embedding is refused here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def save_adapter(folder: Path, name: str = "gemma3_text", **settings: object) -> torch.nn.Module:
    """Save an adapter of a tiny model with random factors; return the merged model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{**SETTINGS, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(tiny_model(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny_model(name), folder).merge_and_unload()


def change(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def check_refused(
    base: Checkpoint, folder: Path, settings: dict[str, object], sentence: str
) -> None:
    """Check that an adapter with other settings is refused with a sentence."""
    save_adapter(folder)
    change(folder, **settings)
    with pytest.raises(CheckpointError, match=sentence):
        merge_adapter(base, folder)


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n.replace(old, new): t for n, t in tensors.items()}, file)


@pytest.fixture
def base(tiny_gemma3: TinyModel) -> Checkpoint:
    return tiny_gemma3.checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}},
        {"alpha_pattern": {"q_proj": 2, r"layers.\d+.mlp.down_proj": 9}},
        {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}, "use_rslora": True},
    ],
    ids=str,
)
def test_merged_weights_are_those_of_peft(
    base: Checkpoint, tmp_path: Path, settings: dict[str, object]
) -> None:
    expected = save_adapter(tmp_path, **settings).state_dict()
    merged = merge_adapter(base, tmp_path)
    for name, stored in merged.tensors.items():
        np.testing.assert_array_equal(values(stored), expected[f"model.{name}"].numpy())
        is_changed = any(target in name for target in SETTINGS["target_modules"])
        # Only what changes is to be written; the rest keeps its bytes on disk.
        assert (stored.raw is None) == is_changed


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["input_layernorm", "norm", "k_proj"]},
    ],
    ids=str,
)
def test_embeddings_and_whole_weights_are_those_of_peft(
    base: Checkpoint, tmp_path: Path, settings: dict[str, object]
) -> None:
    expected = save_adapter(tmp_path, **settings).state_dict()
    merged = merge_adapter(base, tmp_path)
    changed = 0
    for name, stored in merged.tensors.items():
        found = values(stored)
        np.testing.assert_array_equal(found, expected[f"model.{name}"].numpy())
        changed += not np.array_equal(found, values(base.tensors[name]))
    assert changed >= 8
    embedding = expected["model.embed_tokens.weight"]
    assert torch.equal(expected["lm_head.weight"], embedding)
    rows = merged.tensors["embed_tokens.weight"].rows(10, 21)
    # A product of other sizes may be rounded otherwise.
    np.testing.assert_allclose(rows, embedding[10:21].numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "modules", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=str
)
def test_a_head_that_is_no_longer_the_embedding_is_refused(
    base: Checkpoint, tmp_path: Path, modules: list[str]
) -> None:
    merged = save_adapter(tmp_path, modules_to_save=modules)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    with pytest.raises(CheckpointError, match=r"expected .* equal to .*, as the head of a Gemma"):
        merge_adapter(base, tmp_path)


def test_a_whole_norm_is_added_to_1_as_a_gguf_stores_it(base: Checkpoint, tmp_path: Path) -> None:
    expected = save_adapter(tmp_path / "lora", modules_to_save=["norm"]).state_dict()
    stored = read_checkpoint(write_gguf(tmp_path / "base.gguf", base))
    found = values(merge_adapter(stored, tmp_path / "lora").tensors["norm.weight"])
    np.testing.assert_array_equal(found, expected["model.norm.weight"].numpy() + np.float32(1))


def test_a_chat_template_beside_an_adapter_is_the_models(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    added = {"4": {"content": "<|im_start|>"}, "5": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    merged = merge_adapter(base, tmp_path)
    assert merged.chat_template == "{{ messages[0].content }}"
    assert (base.eos_token_ids, merged.eos_token_ids) == ((1,), (1, 5))
    pieces = Tokenizer(merged.tokenizer_model()).control_pieces
    assert (pieces["<|im_start|>"], pieces["<|im_end|>"]) == (4, 5)


def test_a_slice_is_merged_alone(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    stored = merge_adapter(base, tmp_path).tensors["layers.3.mlp.down_proj.weight"]
    np.testing.assert_array_equal(stored.rows(10, 21), values(stored)[10:21])


def test_the_adapter_of_a_model_with_images_changes_its_text_model(
    base: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = save_adapter(tmp_path).state_dict()
    prefix = "base_model.model.model."
    rename(tmp_path, prefix, f"{prefix}language_model.")
    file = tmp_path / "adapter_model.safetensors"
    vision = {
        f"{prefix}vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)
    }
    safetensors.torch.save_file(safetensors.torch.load_file(file) | vision, file)
    stored = merge_adapter(base, tmp_path).tensors["layers.0.self_attn.q_proj.weight"]
    theirs = expected["model.layers.0.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(values(stored), theirs)
    assert "those for images and sound are left out" in caplog.text


def test_an_export_with_an_adapter_equals_the_export_of_the_merged_model(tmp_path: Path) -> None:
    base = save_checkpoint(tiny_model("gemma_mha"), tmp_path / "base")
    merged = save_checkpoint(save_adapter(tmp_path / "lora", "gemma_mha"), tmp_path / "merged")
    export(base, tmp_path / "one", adapter=tmp_path / "lora", tasks=("generate",))
    export(merged, tmp_path / "two", tasks=("generate",))
    assert Artifact.open(tmp_path / "one").config == Artifact.open(tmp_path / "two").config
    changed = safetensors.torch.load_file(tmp_path / "one/weights/written.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "two/weights/model.safetensors")
    assert any("q_proj" in name for name in changed)
    for name, tensor in changed.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(tensor, theirs[f"model.{name}"])
    assert "base + lora" in (tmp_path / "one/manifest.json").read_text()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "use_dora is True, which cannot be merged here"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is .* merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "the weights of 'lm_head', which modules_to_save"),
        ({"a_later_feature": 1}, "a_later_feature is 1"),
        ({"bias": "all"}, "expected bias as one of none, got 'all'"),
        ({"peft_type": "IA3"}, "expected peft_type as one of LORA, got 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights as one of True, .* got 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ],
    ids=str,
)
def test_what_is_more_than_a_sum_is_refused(
    base: Checkpoint, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    check_refused(base, tmp_path, settings, sentence)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("down_proj.lora_A", "down_proj.lora_magnitude_vector", "is no factor of a layer's proj"),
        ("layers.6.mlp.down_proj", "embed_tokens", r"factors of embed_tokens\.weight \[300, 48\]"),
        ("layers.6.mlp.down_proj", "lm_head", "lm_head.lora_A.weight changes the head alone"),
        ("layers.6.", "layers.7.", r"layers\.7\..* which the checkpoint has not; did you mean"),
        ("layers.6.mlp.down_proj.lora_A", "layers.6.mlp.up_proj.lora_A", "got one of them"),
    ],
)
def test_a_factor_without_a_place_is_named(
    base: Checkpoint, tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    save_adapter(tmp_path)
    rename(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=sentence):
        merge_adapter(base, tmp_path)


def test_the_adapter_of_another_size_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    name = "layers.0.self_attn.q_proj.weight"
    wide = replace(base.tensors[name], shape=(1024, 64))
    other = replace(base, tensors={**base.tensors, name: wide})
    with pytest.raises(CheckpointError, match="trained on another model"):
        merge_adapter(other, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected an adapter's weights, got nothing"):
        merge_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": None}, "expected lora_alpha as a number .* got None"),
        ({"lora_alpha": "6"}, "expected lora_alpha as a number .* got '6'"),
        ({"lora_alpha": True}, "expected lora_alpha as a number .* got True"),
        ({"alpha_pattern": {"q_proj": "6"}}, "expected lora_alpha as a number .* got '6'"),
        ({"alpha_pattern": ["q_proj"]}, "expected alpha_pattern as numbers by names"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "expected alpha_pattern as numbers by names"),
        ({"modules_to_save": "norm"}, "expected modules_to_save as names of modules"),
        ({"lora_alpha": 1e300}, "expected lora_alpha as a number below 1e"),
        ({"use_rslora": "no"}, "expected use_rslora as true or false, got 'no'"),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(
    base: Checkpoint, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    check_refused(base, tmp_path, settings, sentence)


@pytest.mark.parametrize("shape", [(4,), (4, 1, 48), (4, 47), (0, 48)])
def test_factors_of_another_shape_are_refused(
    base: Checkpoint, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    safetensors.torch.save_file({**tensors, name: torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError, match=r"trained on another model|expected the shape of"):
        merge_adapter(base, tmp_path)


def test_a_factor_under_two_names_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    again = {name.replace("model.model.model", "model.model"): tensors[name].clone()}
    safetensors.torch.save_file(tensors | again, file)
    with pytest.raises(CheckpointError, match="expected one tensor for each factor, got"):
        merge_adapter(base, tmp_path)
