"""Merging LoRA adapters of Gemma 3n and Gemma 4: what PEFT merges, bit for bit."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from beam_gemma.errors import CheckpointError
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.tensors import Checkpoint
from tests.doubles.checkpoint_files import values
from tests.doubles.gguf_models import MODELS, newer_model, write_model
from tests.doubles.reference import save_checkpoint

# Warned of for tied embeddings and for parameters: neither changes what is merged.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PER_LAYER = ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",
             "embed_tokens_per_layer"]  # fmt: skip
ALTUP = ["modality_router", "correction_coefs", "prediction_coefs", "linear_left", "linear_right",
         "altup_projections.0", "altup_unembed_projections.2"]  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def save_adapter(folder: Path, name: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors; return the weights of the merged model."""
    torch.manual_seed(3)
    base = newer_model(name)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **settings}
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    return {name.removeprefix("model."): x for name, x in merged.state_dict().items()}


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n.replace(old, new): t for n, t in tensors.items()}, file)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {
        name: read_checkpoint(save_checkpoint(newer_model(name), tmp_path_factory.mktemp(name)))
        for name in MODELS
    }


def changed_names(
    merged: Checkpoint, base: Checkpoint, expected: dict[str, torch.Tensor]
) -> set[str]:
    """Check that all weights are those expected; return the names of those that have changed."""
    changed = set()
    for name, stored in merged.tensors.items():
        found = values(stored)
        np.testing.assert_array_equal(found, expected[name].numpy(), name)
        if not np.array_equal(found, values(base.tensors[name])):
            changed.add(name)
    return changed


@pytest.mark.parametrize(
    ("name", "settings", "number"),
    [
        ("E2B", {"target_modules": ATTENTION + PER_LAYER}, 6 * 7 - 3 * 2 + 14),
        ("31B", {"target_modules": ATTENTION}, 6 * 7 - 2),
        ("3n", {"target_modules": ATTENTION + PER_LAYER + ALTUP}, 6 * 12 - 3 * 2 + 16),
        ("26B-A4B", {"target_modules": ["router.proj"], "target_parameters": EXPERTS}, 18),
        ("26B-A4B", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}, 12),
        ("26B-A4B", {"target_parameters": EXPERTS[1:], "use_rslora": True}, 6),
        ("26B-A4B", {"target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2},
                     "alpha_pattern": {r"layers.\d+.experts.gate_up_proj": 2}}, 12),
        ("26B-A4B", {"modules_to_save": ["router", "post_feedforward_layernorm_1"],
                     "target_modules": ["q_proj"]}, 6 * 5),
        ("26B-A4B", {"modules_to_save": ["experts"], "target_modules": ["q_proj"]}, 6 * 3),
        ("3n", {"modules_to_save": ["altup", "per_layer_projection_norm"],
                "target_modules": ["q_proj"]}, 6 * 6 + 1),
    ],
    ids=str,
)  # fmt: skip
def test_merged_weights_are_those_of_peft(
    bases: dict[str, Checkpoint], tmp_path: Path, name: str, settings: dict[str, Any], number: int
) -> None:
    expected = save_adapter(tmp_path, name, **settings)
    merged = merge_adapter(bases[name], tmp_path)
    assert len(changed_names(merged, bases[name], expected)) == number


@pytest.mark.parametrize("name", ["embed_tokens_per_layer.weight", "layers.1.mlp.up_proj.weight"])
def test_a_slice_is_merged_alone(bases: dict[str, Checkpoint], tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path, "E2B", target_modules=["embed_tokens_per_layer", "up_proj"])
    stored = merge_adapter(bases["E2B"], tmp_path).tensors[name]
    # float32: a product of other sizes may be rounded otherwise.
    np.testing.assert_allclose(stored.rows(10, 21), values(stored)[10:21], rtol=0, atol=2e-6)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_an_expert_is_merged_alone(bases: dict[str, Checkpoint], tmp_path: Path, part: str) -> None:
    save_adapter(tmp_path, "26B-A4B", target_parameters=EXPERTS)
    stored = merge_adapter(bases["26B-A4B"], tmp_path).tensors[f"layers.2.experts.{part}"]
    np.testing.assert_allclose(stored.rows(2, 4), values(stored)[2:4], rtol=0, atol=2e-6)


def test_what_layers_without_keys_have_is_left_out(
    bases: dict[str, Checkpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters from before layers shared keys in transformers; it passes over these too."""
    save_adapter(tmp_path / "one", "E2B", target_modules=["k_proj", "v_proj", "q_proj"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = merge_adapter(bases["E2B"], tmp_path / "one")
    file = tmp_path / "two/adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    more = {n.replace("layers.2.", "layers.5."): t.clone() for n, t in tensors.items()
            if "layers.2." in n and "q_proj" not in n}  # fmt: skip
    safetensors.torch.save_file(tensors | more, file)
    after = merge_adapter(bases["E2B"], tmp_path / "two")
    assert "leaving out 4 tensors such as base_model.model.model.layers.5" in caplog.text
    assert after.tensors.keys() == before.tensors.keys()
    for name, stored in after.tensors.items():
        np.testing.assert_array_equal(values(stored), values(before.tensors[name]))


def test_the_adapter_of_a_whole_gemma_4_changes_its_text_model(
    bases: dict[str, Checkpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = save_adapter(tmp_path, "26B-A4B", target_modules=["q_proj"],
                            target_parameters=EXPERTS)  # fmt: skip
    prefix = "base_model.model.model."
    rename(tmp_path, prefix, f"{prefix}language_model.")
    file = tmp_path / "adapter_model.safetensors"
    audio = {f"{prefix}audio_tower.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | audio, file)
    merged = merge_adapter(bases["26B-A4B"], tmp_path)
    assert len(changed_names(merged, bases["26B-A4B"], expected)) == 18
    assert "those for images and sound are left out" in caplog.text


def test_a_whole_norm_has_the_weight_that_a_gguf_stores(tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", newer_model("E2B"), MODELS["E2B"])
    base = read_checkpoint(path)
    expected = save_adapter(
        tmp_path / "lora", "E2B", modules_to_save=["norm"], target_modules=["q_proj"]
    )
    merged = merge_adapter(base, tmp_path / "lora")
    norms = 6 * 6 + 3 + 2  # those of keys are in three layers, and two are in no layer
    assert len(changed_names(merged, base, expected)) == norms + 6


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("layers.2.experts.lora_A", "layers.2.experts.lora_C", "is no factor of a layer's"),
        ("layers.2.experts.lora_A", "layers.9.experts.lora_A", "lora_A and lora_B of layers"),
        ("layers.2.experts.", "layers.9.experts.", "as factors of the experts' weights, got"),
        ("layers.2.experts.", "layers.2.mlp.", r"layers\.2\.mlp\.weight, which the checkpoint"),
        ("layers.2.experts.", "layers.2.router.proj.", "expected factors of layers.2.router.proj"),
    ],
)
def test_factors_without_a_place_are_named(
    bases: dict[str, Checkpoint], tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    save_adapter(tmp_path, "26B-A4B", target_parameters=EXPERTS[1:])
    rename(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=sentence):
        merge_adapter(bases["26B-A4B"], tmp_path)


@pytest.mark.parametrize("rows", [23, 3, 30])
def test_factors_of_another_number_of_experts_are_refused(
    bases: dict[str, Checkpoint], tmp_path: Path, rows: int
) -> None:
    save_adapter(tmp_path, "26B-A4B", target_parameters=EXPERTS[:1])
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "base_model.model.model.layers.0.experts.lora_A.weight"
    safetensors.torch.save_file({**tensors, name: torch.ones(rows, 64)}, file)
    with pytest.raises(CheckpointError, match=r"as factors of the experts' weights, got"):
        merge_adapter(bases["26B-A4B"], tmp_path)
