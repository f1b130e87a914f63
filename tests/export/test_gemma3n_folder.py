"""Gemma 3n from the folders it is published in: names, shapes, and what no graph needs."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beam_gemma.errors import CheckpointError, ConfigError
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.tensors import TABLE, StoredTensor
from tests.doubles.gemma3n_models import MODELS, gemma3n_model, save_published, tiny_gemma3n
from tests.doubles.reference import save_checkpoint


def values(stored: StoredTensor) -> np.ndarray:
    return np.concatenate(list(stored.chunks()))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return save_published("gemma3n", tmp_path / "published")


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_folder(name: str) -> None:
    checkpoint = tiny_gemma3n(name).checkpoint
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    assert checkpoint.norm_offset == 0.0


def test_a_published_folder_has_the_same_text_model(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Towers are left out, and so are keys and values of layers that read those of others."""
    plain, found = tiny_gemma3n("gemma3n").checkpoint, read_checkpoint(published, text_only=True)
    assert "without what it has for images and sound" in caplog.text
    assert found.config == plain.config
    assert found.tensors.keys() == plain.tensors.keys()
    for name, stored in plain.tensors.items():
        np.testing.assert_array_equal(values(found.tensors[name]), values(stored))
    assert np.isnan(load_file(published / "model.safetensors")[
        "model.language_model.layers.5.self_attn.k_proj.weight"
    ]).all()  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_names_may_have_any_of_the_prefixes_in_use(published: Path, prefix: str) -> None:
    file = published / "model.safetensors"
    tensors = load_file(file)
    renamed = {n.replace("model.language_model.", prefix): t for n, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    names = read_checkpoint(published, text_only=True).tensors.keys()
    assert names == tiny_gemma3n("gemma3n").checkpoint.tensors.keys()


def test_a_missing_tensor_of_the_streams_is_named(published: Path) -> None:
    file = published / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.language_model.layers.1.altup.modality_router.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = read_checkpoint(published, text_only=True)
    with pytest.raises(CheckpointError, match=r"expected the tensor layers\.1\.altup\.modality_r"):
        check_names(checkpoint.tensors, expected_shapes(checkpoint))


def test_a_table_of_another_size_is_refused(published: Path) -> None:
    path = published / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["vocab_size_per_layer_input"] -= 1
    path.write_text(json.dumps(raw))
    checkpoint = read_checkpoint(published, text_only=True)
    with pytest.raises(CheckpointError, match=r"embed_tokens_per_layer.* of shape"):
        check_names(checkpoint.tensors, expected_shapes(checkpoint))


def test_a_slice_has_a_width_for_each_layer(tmp_path: Path) -> None:
    """As a MatFormer is cut, by layer; a list of another length is refused."""
    folder = save_checkpoint(gemma3n_model("gemma3n"), tmp_path)
    checkpoint = read_checkpoint(folder)
    widths = MODELS["gemma3n"]["intermediate_size"]
    assert checkpoint.config.intermediate_sizes == tuple(widths)
    assert [
        checkpoint.tensors[f"layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(6)
    ] == widths
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"intermediate_size": widths[:5]}))
    with pytest.raises(ConfigError, match=r"intermediate_size: expected one number, or 6"):
        read_checkpoint(folder)


def test_the_table_keeps_its_numbers() -> None:
    stored = tiny_gemma3n("gemma3n").checkpoint.tensors[TABLE]
    reference = tiny_gemma3n("gemma3n").reference.model.embed_tokens_per_layer.weight
    np.testing.assert_array_equal(values(stored), reference.detach().numpy())
