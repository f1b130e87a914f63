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
from export.__main__ import export
from export.checkpoints.lora import merge_adapter
from export.checkpoints.tensors import Checkpoint, StoredTensor
from tests.conftest import TinyModel
from tests.doubles.reference import save_checkpoint, tiny_model

SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def values(stored: StoredTensor) -> np.ndarray:
    return np.concatenate(list(stored.chunks()))


def save_adapter(folder: Path, name: str = "gemma3_text", **settings: object) -> torch.nn.Module:
    """Save an adapter of a tiny model with random factors; return the merged model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{**SETTINGS, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(tiny_model(name), config)
    model.save_pretrained(folder)
    return model.merge_and_unload()


def change(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n.replace(old, new): t for n, t in tensors.items()}, file)


@pytest.fixture
def base(tiny_gemma3: TinyModel) -> Checkpoint:
    return tiny_gemma3.checkpoint


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}], ids=str
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
    assert "for images is left out" in caplog.text


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
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .* merge_and_unload"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is"),
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
    save_adapter(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=sentence):
        merge_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("down_proj.lora_A", "down_proj.lora_magnitude_vector", "is no factor of a layer's proj"),
        ("layers.6.mlp.down_proj", "embed_tokens", "is no factor of a layer's projection"),
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
