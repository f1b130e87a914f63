"""Reading `.ckpt` files: written from the tiny models as gemma_pytorch names and fuses them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.errors import CheckpointError
from export.__main__ import export
from export.checkpoints import ckpt_file
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.released_sizes import SIZES, Size
from export.checkpoints.tensors import Checkpoint, StoredTensor
from tests.conftest import TinyModel
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")


def values(stored: StoredTensor) -> np.ndarray:
    return np.concatenate(list(stored.chunks()))


def state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights as gemma_pytorch saves them, rotary tables included."""
    ours = {n: torch.from_numpy(values(t)) for n, t in checkpoint.tensors.items()}
    state = {"embedder.weight": ours.pop("embed_tokens.weight"), "freqs_cis": torch.ones(2, 2) + 0j}
    for i in range(checkpoint.config.num_hidden_layers):
        prefix = f"layers.{i}.self_attn."
        fused = [ours.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        ours[f"{prefix}qkv_proj.weight"] = torch.cat(fused)
    for name, tensor in ours.items():
        theirs = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
        state[f"model.{theirs}"] = tensor
    return state


def with_images(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of a Gemma 3 with images around the same text model."""
    parts = {
        "siglip_vision_model.encoder_blocks.0.mlp.fc1.weight": torch.ones(3, 2),
        "mm_soft_embedding_norm.weight": torch.ones(2),
        "mm_input_projection.weight": torch.ones(4, 2),
        "local_freqs_cis": torch.ones(2, 2) + 0j,
    }
    return {n.replace("embedder", "text_token_embedder"): t for n, t in state.items()} | parts


def int8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the matrices as whole numbers with one factor for each row."""
    result = dict(state)
    for name, tensor in state.items():
        if tensor.ndim == 2 and not tensor.is_complex():
            scaler = tensor.abs().amax(dim=1) / 127
            result[name] = (tensor / scaler[:, None]).round().to(torch.int8)
            result[f"{name}_scaler"] = scaler
    return result


def write(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    torch.save({"model_state_dict": state}, folder / "tiny.ckpt")
    return folder / "tiny.ckpt"


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, tiny: TinyModel) -> TinyModel:
    """Each tiny model that gemma_pytorch knows, as if it were a released size."""
    if tiny.checkpoint.config.model_type not in MODEL_TYPES:
        pytest.skip("gemma_pytorch knows no such architecture")
    raw = json.loads((tiny.checkpoint.path / "config.json").read_text())
    monkeypatch.setattr(ckpt_file, "SIZES", (*SIZES, Size(name="tiny", raw=raw)))
    return tiny


@pytest.mark.parametrize("images", [False, True])
def test_a_ckpt_says_what_the_safetensors_say(
    released: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, images: bool
) -> None:
    expected, state = released.checkpoint, state_dict(released.checkpoint)
    found = read_checkpoint(write(tmp_path, with_images(state) if images else state))
    assert found.config == expected.config
    assert found.norm_offset == expected.norm_offset
    assert found.tensors.keys() == expected.tensors.keys()
    for name, stored in found.tensors.items():
        theirs = values(expected.tensors[name])
        np.testing.assert_array_equal(values(stored), theirs)
        assert stored.raw is not None  # can be linked, not copied
        content = np.fromfile(stored.raw.file, np.uint8, stored.raw.length, "", stored.raw.offset)
        assert content.tobytes() == theirs.tobytes()
    assert ("left out" in caplog.text) == images


def test_int8_weights_are_scaled_row_by_row(released: TinyModel, tmp_path: Path) -> None:
    state = int8(state_dict(released.checkpoint))
    found = read_checkpoint(write(tmp_path, state))
    fused = state["model.layers.1.self_attn.qkv_proj.weight"].float()
    fused *= state["model.layers.1.self_attn.qkv_proj.weight_scaler"][:, None]
    parts = [values(found.tensors[f"layers.1.self_attn.{p}_proj.weight"]) for p in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), fused.numpy())
    for name, stored in found.tensors.items():
        theirs = values(released.checkpoint.tensors[name])
        # Half a step of an 8-bit scale.
        atol = float(np.abs(theirs).max()) / 127
        np.testing.assert_allclose(values(stored), theirs, rtol=0, atol=atol)


def test_a_ckpt_exports_to_the_same_graph_and_links_its_weights(
    tiny_gemma3: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((tiny_gemma3.checkpoint.path / "config.json").read_text())
    monkeypatch.setattr(ckpt_file, "SIZES", (Size(name="tiny", raw=raw),))
    path = write(tmp_path, state_dict(tiny_gemma3.checkpoint))
    export(path, tmp_path / "exported", tasks=("generate",))
    assert path.samefile(tmp_path / "exported/weights/tiny.ckpt")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_released_size_is_known_by_its_shapes(size: Size, tmp_path: Path) -> None:
    """With the vocabulary that the file has: some releases have 64 or 128 rows more."""
    shapes = {**size.tensor_shapes(), "embed_tokens.weight": (256128, size.config.hidden_size)}
    tensors = {
        name: StoredTensor(name=name, shape=s, dtype="bfloat16", raw=None, rows=np.zeros)
        for name, s in shapes.items()
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    found = ckpt_file._config(tmp_path, tensors)
    assert found.vocab_size == 256128
    assert (found.model_type, found.layer_types, found.query_pre_attn_scalar) == (
        size.config.model_type, size.config.layer_types, size.config.query_pre_attn_scalar
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_released_size_has_the_published_number_of_parameters(size: Size) -> None:
    shapes = size.tensor_shapes()
    if not size.counts_embedding:
        shapes.pop("embed_tokens.weight")
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if size.num_parameters is None:
        assert size.name.endswith(f"{count / 1e9:.0f}B")
    else:
        assert count == size.num_parameters


def test_what_is_no_release_is_refused(tiny_gemma3: TinyModel, tmp_path: Path) -> None:
    state = state_dict(tiny_gemma3.checkpoint)
    with pytest.raises(CheckpointError, match=r"released size .*, got 7 layers of width 48"):
        read_checkpoint(write(tmp_path, state))
    torch.save(state, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="expected model_state_dict"):
        read_checkpoint(tmp_path / "bare.ckpt")
    (tmp_path / "text.ckpt").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"that torch\.load reads with weights_only"):
        read_checkpoint(tmp_path / "text.ckpt")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_ckpt_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"x": Payload()}}, "bad.ckpt")
    with pytest.raises(CheckpointError, match="weights_only"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not Path("ran").exists()
