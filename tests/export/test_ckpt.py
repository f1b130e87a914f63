"""Reading `.ckpt` files: written from the tiny models as gemma_pytorch names and fuses them."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from beam_gemma.errors import CheckpointError
from export.__main__ import export
from export.checkpoints import ckpt_file
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.released_sizes import SIZES, Size
from export.checkpoints.tensors import StoredTensor
from tests.conftest import TinyModel
from tests.doubles.checkpoint_files import state_dict, values, write_ckpt

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")


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
    path = write_ckpt(tmp_path, with_images(state) if images else state)
    found = read_checkpoint(path, text_only=True)
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
    found = read_checkpoint(write_ckpt(tmp_path, state))
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
    path = write_ckpt(tmp_path, state_dict(tiny_gemma3.checkpoint))
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
        read_checkpoint(write_ckpt(tmp_path, state))
    torch.save(state, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="expected model_state_dict"):
        read_checkpoint(tmp_path / "bare.ckpt")
    (tmp_path / "text.ckpt").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"the zip format of torch\.save"):
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


def storage(num_items: int = 4, key: bytes = b"0", kind: bytes = b"FloatStorage") -> bytes:
    text = b"X" + len(key).to_bytes(4, "little") + key
    number = b"J" + num_items.to_bytes(4, "little")
    return b"(X\7\0\0\0storagectorch\n" + kind + b"\n" + text + b"X\3\0\0\0cpu" + number + b"tQ"


def view(offset: bytes = b"K\0", shape: bytes = b"K\4\x85", strides: bytes = b"K\1\x85") -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return rebuild + b"(" + storage() + offset + shape + strides + b"\x89NtR"


def state(value: bytes, key: bytes = b"X\1\0\0\0x") -> bytes:
    return b"\x80\2}X\x10\0\0\0model_state_dict}" + key + value + b"ss."


TUPLES = b"K\1" + b"q\0h\0\x86" * 60
BAD_PICKLES = {
    "call of a function": (b"cos\nsystem\n(X\4\0\0\0truetR.", "call of 'os.system'"),
    "call by another instruction": (b"(X\4\0\0\0trueios\nsystem\n.", "the instruction INST"),
    "class": (b"cos\n_wrap_close\n)\x81.", "the instruction NEWOBJ"),
    "call of what is known": (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "not enough values"),
    "attributes of a module": (state(b"cos\nenviron\n}b"), "a tensor under each name"),
    "name in a module": (state(b"cos\nsystem\n"), "a tensor under each name"),
    "number that is no tensor": (state(b"K\1"), "a tensor under each name"),
    "key whose hash takes a year": (state(b"K\1", TUPLES), "expected a string as key"),
    "memo of 32 GB": (b"}r\xff\xff\xff\xff.", "expected model_state_dict"),
    "number of 2 GB": (b"\x8b\xff\xff\xff\x7f.", "is damaged or does more"),
    "array of 2^60 bytes": (b"\x96" + (1 << 60).to_bytes(8, "little") + b".", "is damaged or"),
    "end in the middle": (b"\x80\2}", "is damaged or does more"),
    "nothing left": (b"\x80\2R.", "is damaged or does more"),
    "view beyond its storage": (state(view(offset=b"K\1")), "got the end of its record"),
    "negative offset": (state(view(offset=b"J\xff\xff\xff\xff")), "a storage and an offset"),
    "shape beyond its storage": (state(view(shape=b"K\5\x85")), "got the end of its record"),
    "stride of 0": (state(view(strides=b"K\0\x85")), "with strides (0,)"),
    "shape without strides": (state(view(strides=b")")), "a shape and as many strides"),
    "storage that is not there": (
        state(view()).replace(b"X\1\0\0\x000", b"X\1\0\0\x009"), "got no record of them"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_pickle_of_more_than_weights_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = BAD_PICKLES[name]
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:
        archive.writestr("bad/data.pkl", content)
        archive.writestr("bad/data/0", bytes(16))
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "bad.ckpt"))


def test_an_archive_that_is_larger_inside_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(64 << 20))
    assert file.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"'data.pkl' as torch.save stores it, got it comp"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (20, 0xFFFFFFF0, "as torch.save stores it"),
        (24, 0xFFFFFFF0, "as torch.save stores it"),
        (42, 0xFFFFFFF0, "expected the record 'data.pkl', got none"),
        (42, 0, "at bytes of its own, got data.pkl and data/0 at the same"),
    ],
)
def test_a_record_that_is_not_in_the_archive_is_refused(
    tmp_path: Path, place: int, value: int, sentence: str
) -> None:
    file = tmp_path / "bad.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data/0", bytes(16))
        archive.writestr("x/data.pkl", b"}.")
    data = bytearray(file.read_bytes())
    directory = data.rindex(b"PK\1\2")
    data[directory + place : directory + place + 4] = value.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read_checkpoint(file)


def test_a_bare_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.ckpt").write_bytes(pickle.dumps({"model_state_dict": Payload()}))
    with pytest.raises(CheckpointError, match=r"expected the zip format of torch\.save"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not Path("ran").exists()
