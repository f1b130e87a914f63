"""Reading GGUF: files written from the tiny models say the same as their safetensors."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from beam_gemma.errors import CheckpointError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.rope import RopeParameters
from export.checkpoints.gguf_file import _eos_token_ids
from export.checkpoints.gguf_header import read_gguf_header
from export.checkpoints.gguf_tensors import stored_tensor
from export.checkpoints.hf_folder import read_checkpoint
from tests.conftest import TinyModel
from tests.doubles.checkpoint_files import ARCHITECTURES, finish, values, write_gguf, write_mini


def test_a_gguf_says_what_the_safetensors_say(tiny: TinyModel, tmp_path: Path) -> None:
    expected = tiny.checkpoint
    if expected.config.model_type not in ARCHITECTURES:
        pytest.skip("VaultGemma has no GGUF; test_gguf_newer.py has those of Gemma 4")
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
    finish(writer)
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
    finish(writer)
    with pytest.raises(CheckpointError, match=r"expected a GGUF of gemma, .* architecture 'llama'"):
        read_checkpoint(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1,)),
        ({"eos_token_id": 1, "chat_template": "{{ messages }}"}, (1, 3, 4, 5)),
        ({"eos_token_id": 3}, (1, 3)),
        ({"eos_token_id": 1, "eot_token_id": 2}, (1, 2)),
    ],
    ids=str,
)
def test_a_turn_ends_a_text_where_there_are_turns(
    tmp_path: Path, fields: dict[str, int | str], expected: tuple[int, ...]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    pieces = ["<pad>", "<eos>", "<bos>", "<end_of_turn>", "<turn|>", "<|tool_response>"]
    writer.add_array("tokenizer.ggml.tokens", pieces)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    finish(writer)
    assert _eos_token_ids(read_gguf_header(tmp_path / "x.gguf"), vocab_size=6) == expected


def rewritten(tiny: TinyModel, path: Path, **settings: object) -> Path:
    """Write a GGUF file whose keys, without the architecture's name, have these values too."""
    arch = ARCHITECTURES[tiny.checkpoint.config.model_type]
    keys = {f"{arch}.{key}": value for key, value in settings.items()}
    return write_gguf(path, tiny.checkpoint, settings=keys)


def test_every_number_of_the_architecture_is_read(tiny_gemma3: TinyModel, tmp_path: Path) -> None:
    base = tiny_gemma3.checkpoint
    pattern = [True, False, True, False, True, False, True]
    settings = {
        "attention.sliding_window_pattern": pattern,
        "rope.freq_base_swa": 2e4,
        "final_logit_softcapping": 30.0,
        "rope.scaling.type": "linear",
        "attention.value_length": base.config.head_dim,
        "vocab_size": base.config.vocab_size,
        "mm.tokens_per_image": 256,
    }
    other = replace(base, config=replace(base.config, rms_norm_eps=1e-5))
    tiny = replace(tiny_gemma3, checkpoint=other)
    config = read_checkpoint(rewritten(tiny, tmp_path / "x.gguf", **settings)).config
    assert config.rms_norm_eps == 1e-5
    assert config.layer_types == tuple(SLIDING if is_sliding else FULL for is_sliding in pattern)
    assert (config.rope(SLIDING).rope_theta, config.rope(SLIDING).factor) == (2e4, 1.0)
    assert (config.rope(FULL).factor, config.final_logit_softcapping) == (8.0, 30.0)


def test_scaling_is_of_all_layers_but_in_gemma_3(tiny: TinyModel, tmp_path: Path) -> None:
    model_type = tiny.checkpoint.config.model_type
    if model_type not in ARCHITECTURES:
        pytest.skip("VaultGemma has no GGUF; test_gguf_newer.py has those of Gemma 4")
    ropes = tuple(
        (kind, RopeParameters(rope_theta=1e4, factor=4.0)) for kind in tiny.checkpoint.config.groups
    )
    config = replace(tiny.checkpoint.config, rope_parameters=ropes)
    other = replace(tiny, checkpoint=replace(tiny.checkpoint, config=config))
    found = read_checkpoint(rewritten(other, tmp_path / "x.gguf")).config
    scaled = [kind for kind in found.groups if found.rope(kind).factor == 4.0]
    assert scaled == ([FULL] if model_type == "gemma3_text" else list(found.groups))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rope.scaling.type", "yarn", "rope.scaling.type as none or linear, got 'yarn'"),
        ("rope.scaling.attn_factor", 2.0, "rope.scaling.attn_factor as 1.0, got 2.0"),
        ("rope.dimension_count", 128, "rope.dimension_count as 256, got 128"),
        ("attention.value_length", 128, "attention.value_length as 256, got 128"),
        ("attention.causal", False, "attention.causal as True, got False"),
        ("attention.scale", 0.5, "the key 'gemma3.attention.scale' is not known"),
        ("attn_logit_softcapping", 50.0, "the key 'gemma3.attn_logit_softcapping' is not known"),
        ("vocab_size", 299, "vocab_size as 300, got 299"),
        ("attention.sliding_window_pattern", [True], "true or false for 7 layers, got [True]"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    tiny_gemma3: TinyModel, tmp_path: Path, key: str, value: object, sentence: str
) -> None:
    path = rewritten(tiny_gemma3, tmp_path / "x.gguf", **{key: value})
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("packed", ["", "embed_tokens.weight"])
def test_a_head_is_left_out_if_it_is_the_embedding(tmp_path: Path, packed: str) -> None:
    base = write_mini(tmp_path / "mini")
    head = values(base.tensors["embed_tokens.weight"])
    if packed:  # the same numbers in another format
        kind = gguf.GGMLQuantizationType.Q8_0
        head = gguf.quants.dequantize(gguf.quants.quantize(head, kind), kind)
    path = write_gguf(tmp_path / "x.gguf", base, head=head, packed=packed)
    assert read_checkpoint(path).tensors.keys() == base.tensors.keys()
    head[7, 7] += 1
    path = write_gguf(tmp_path / "y.gguf", base, head=head, packed=packed)
    with pytest.raises(
        CheckpointError, match=r"expected output\.weight equal to token_embd\.weight"
    ):
        read_checkpoint(path)


def test_the_parts_of_a_model_are_one_checkpoint(tiny_gemma3: TinyModel, tmp_path: Path) -> None:
    base = tiny_gemma3.checkpoint
    whole = read_checkpoint(write_gguf(tmp_path / "whole.gguf", base))
    write_gguf(tmp_path / "tiny.gguf", base, part_tensors=30)
    files = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(files) == 4
    for file in (files[0], files[2]):
        found = read_checkpoint(file)
        assert found.config == whole.config
        assert found.tensors.keys() == whole.tensors.keys()
        for name, stored in found.tensors.items():
            np.testing.assert_array_equal(values(stored), values(whole.tensors[name]))
    files[3].rename(tmp_path / "kept.gguf")
    with pytest.raises(
        CheckpointError, match=r"tiny-00004-of-00004\.gguf: expected .* got nothing"
    ):
        read_checkpoint(files[0])
    shutil.copyfile(files[2], files[3])
    with pytest.raises(CheckpointError, match=r"00004\.gguf: expected the part that says \[3, 4, "):
        read_checkpoint(files[0])
    with pytest.raises(CheckpointError, match="expected the name of one of 4 parts"):
        read_checkpoint(tmp_path / "kept.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


ZEROS = bytes(256)
ONE = struct.pack("<I", 1)
BAD_FILES = {
    "empty": (b"", "expected a GGUF file, got one of 0 bytes"),
    "another format": (b"PK\3\4" + ZEROS, "expected a GGUF file of version 2 or 3"),
    "big-endian": (header(version=3 << 24), "in little-endian order"),
    "2^60 keys": (header(ZEROS, keys=1 << 60), "at most 4,096 metadata keys, got 1,152,921"),
    "more keys than fit": (header(ZEROS, keys=4096), "no more metadata keys than fit"),
    "2^60 tensors": (header(ZEROS, tensors=1 << 60), "at most 16,384 tensors, got 1,152,921"),
    "more tensors than fit": (header(ZEROS, tensors=16_000), "no more tensors than fit"),
    "key of 2^63 bytes": (
        header(struct.pack("<Q", 1 << 63), ZEROS, keys=1), "bytes of 'a metadata key'"
    ),
    "key twice": (header(key("a", 4, ONE), key("a", 4, ONE), keys=2), "once, got 'a' again"),
    "key of an unknown type": (header(key("a", 13, ZEROS), keys=1), "a type of GGUF for 'a'"),
    "key that is no UTF-8": (
        header(struct.pack("<Q", 1), b"\xff", ZEROS, keys=1), "UTF-8 in 'a metadata key'"
    ),
    "array in an array": (
        header(key("a", 9, struct.pack("<IQ", 9, 1) + ZEROS), keys=1),
        "numbers or strings in the array 'a', got type 9",
    ),
    "array of 2^60 strings": (
        header(key("a", 9, struct.pack("<IQ", 8, 1 << 60) + ZEROS), keys=1), "at most 4,194,304"
    ),
    "array of more numbers than fit": (
        header(key("a", 9, struct.pack("<IQ", 10, 100) + ZEROS), keys=1), "than fit into the file"
    ),
    "alignment of 3": (
        header(key("general.alignment", 4, struct.pack("<I", 3)), keys=1), "power of two, got 3"
    ),
    "2^31 dimensions": (
        header(text("x"), struct.pack("<I", 1 << 31), ZEROS, tensors=1), "1 to 4 dimensions of x"
    ),
    "shape whose size overflows": (
        header(tensor("x", (1 << 40,) * 4), ZEROS, tensors=1), "ends inside the tensor x"
    ),
    "dimension of 2^63": (header(tensor("x", (1 << 63,)), ZEROS, tensors=1), "the shape of x"),
    "dimension of 0": (header(tensor("x", (0, 2)), ZEROS, tensors=1), "expected the shape of x"),
    "type that ggml has dropped": (
        header(tensor("x", kind=4), ZEROS, tensors=1), "a type of ggml for x, got 4"
    ),
    "type unknown": (header(tensor("x", kind=999), ZEROS, tensors=1), "a type of ggml for x"),
    "part of a block": (header(tensor("x", kind=8), ZEROS, tensors=1), "a multiple of 32 columns"),
    "tensor twice": (
        header(tensor("x"), tensor("x", offset=32), ZEROS, tensors=2), "each tensor once"
    ),
    "tensors at the same bytes": (
        header(tensor("x", (16,)), tensor("y", offset=32), ZEROS, tensors=2), "got x and y at the"
    ),
    "offset beyond the file": (
        header(tensor("x", offset=1 << 63), ZEROS, tensors=1), "ends inside the tensor x"
    ),
    "offset between two": (header(tensor("x", offset=1), ZEROS, tensors=1), "multiple of 32 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = BAD_FILES[name]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(tmp_path / "bad.gguf")
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "bad.gguf"))


def test_a_number_format_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    whole_numbers = tensor("x", (4, 2), kind=gguf.GGMLQuantizationType.I32)
    (tmp_path / "x.gguf").write_bytes(header(whole_numbers, ZEROS, tensors=1))
    [described] = read_gguf_header(tmp_path / "x.gguf").tensors
    with pytest.raises(CheckpointError, match=r"that the gguf package decodes, got I32"):
        stored_tensor(described)


def test_the_header_says_what_the_gguf_package_reads(
    tiny_gemma3: TinyModel, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny_gemma3.checkpoint)
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    known = {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    assert ours.values == known
    found = {t.name: (t.offset, t.length, list(t.shape)) for t in ours.tensors}
    assert found == {
        t.name: (t.data_offset, t.n_bytes, t.shape.tolist()[::-1]) for t in theirs.tensors
    }


def test_an_embedding_gemma_says_what_its_folder_says(
    two_sided: tuple[SentenceTransformer, Artifact], tmp_path: Path
) -> None:
    expected = read_checkpoint(two_sided[1].path.parent / "checkpoint")
    assert expected.embedding is not None
    found = read_checkpoint(write_gguf(tmp_path / "x.gguf", expected))
    assert found.config.use_bidirectional_attention
    assert found.config.sliding_window == expected.config.sliding_window
    assert found.config.rope(FULL) == expected.config.rope(FULL)
    # A file has no prompts.
    assert found.embedding == replace(expected.embedding, prompts={}, default_prompt_name=None)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, stored in found.tensors.items():
        offset = 1 if name.endswith("norm.weight") else 0
        # float32: 1 + w was rounded.
        theirs = values(expected.tensors[name])
        np.testing.assert_allclose(values(stored) - offset, theirs, rtol=0, atol=2.4e-7)


@pytest.mark.parametrize(
    ("settings", "skip", "sentence"),
    [
        ({"pooling_type": 2}, "", "pooling_type as 1 (mean) or 3 (lasttoken), got 2"),
        ({"dense_2_feat_in": 50}, "", "dense_2_feat_in as 48, got 50"),
        ({"dense_3_feat_out": 50}, "", "dense_3_feat_out as 160, got 50"),
        ({}, "dense.1.weight", "got no dense_3; convert it with --sentence-transformers-dense"),
        ({"attention.causal": True}, "", "attention.causal as False, got True"),
    ],
    ids=str,
)
def test_an_embedding_that_would_be_another_is_refused(
    two_sided: tuple[SentenceTransformer, Artifact],
    tmp_path: Path,
    settings: dict[str, object],
    skip: str,
    sentence: str,
) -> None:
    expected = read_checkpoint(two_sided[1].path.parent / "checkpoint")
    keys = {f"gemma-embedding.{key}": value for key, value in settings.items()}
    path = write_gguf(tmp_path / "x.gguf", expected, settings=keys, skip=skip)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert sentence in str(raised.value)
