"""Reading checkpoints: every tensor has a place, and what has none is named."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.tokenizer import NORMAL, ModelProto, Tokenizer
from export.__main__ import export
from export.checkpoints.hf_folder import check_names, read_checkpoint, read_safetensors
from tests.conftest import TinyModel
from tests.doubles.checkpoint_files import shard
from tests.doubles.reference import MODELS, SHAPE


@pytest.fixture
def folder(tiny_gemma3: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_gemma3.checkpoint.path, tmp_path / "checkpoint"))


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


@pytest.mark.parametrize("model_type", ["diffusion_gemma", "gemma4_assistant"])
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
def test_gemma_3_with_images_gives_its_text_model_alone(
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
    checkpoint = read_checkpoint(tmp_path, text_only=True)
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
        "unsloth_fixed": True,
    }
    # The reference does not apply this cap in a model with images.
    text["final_logit_softcapping"] = 30.0
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").unlink()
    checkpoint = read_checkpoint(folder, text_only=True)
    config = checkpoint.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    assert config.rope("full_attention").factor == 8.0
    assert config.final_logit_softcapping is None
    assert checkpoint.eos_token_ids == (1, 106)


def give_names(folder: Path, names: dict[int, str], file: str) -> None:
    """Name tokens as the settings of a fine-tuned model's tokenizer do."""
    if file == "tokenizer.json":
        settings: dict = {"added_tokens": [{"id": i, "content": n} for i, n in names.items()]}
    else:
        settings = {"added_tokens_decoder": {str(i): {"content": n} for i, n in names.items()}}
    (folder / file).write_text(json.dumps(settings))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_pieces_have_the_names_that_the_settings_give_them(folder: Path, file: str) -> None:
    """As CodeGemma names some that were unused, and ChatML the markers of a turn."""
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.pieces[9].piece, model.pieces[9].type = "<unused3>", NORMAL
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    names = {9: "<|fim_prefix|>", 4: "<|im_start|>", 5: "<|im_end|>", 10: "  ", 262144: "<image>"}
    give_names(folder, names, file)
    tokenizer = Tokenizer(read_checkpoint(folder).tokenizer_model())
    assert tokenizer.control_pieces["<|fim_prefix|>"] == 9
    markup = tokenizer.split("<|im_start|>a<|im_end|>")
    assert tokenizer.encode(markup, add_bos=False) == [4, tokenizer.encode(markup[1:2])[1], 5]
    assert "<start_of_turn>" not in tokenizer.control_pieces
    assert tokenizer.vocab_size == 300


def test_pieces_are_added_up_to_the_rows_of_the_embedding(
    tiny_gemma3: TinyModel, folder: Path
) -> None:
    """As in a model whose embedding was resized for its own markers."""
    model = transformers.Gemma3ForCausalLM(tiny_gemma3.reference.config)
    model.resize_token_embeddings(302, mean_resizing=False)
    model.save_pretrained(folder)
    names = {300: "<|im_start|>", 301: "<|im_end|>", 302: "<image>"}
    give_names(folder, names, "tokenizer_config.json")
    pieces = Tokenizer(read_checkpoint(folder).tokenizer_model()).control_pieces
    assert (pieces["<|im_start|>"], pieces["<|im_end|>"], pieces.get("<image>")) == (300, 301, None)


@pytest.mark.parametrize(
    ("token_id", "name"), [(4, "<eos>"), (1, "<|im_end|>"), (280, "<|im_start|>")]
)
def test_a_name_that_does_not_fit_the_model_is_refused(
    folder: Path, token_id: int, name: str
) -> None:
    give_names(folder, {token_id: name}, "tokenizer_config.json")
    with pytest.raises(CheckpointError, match=rf"expected the piece {token_id} of tokenizer.model"):
        read_checkpoint(folder).tokenizer_model()


@pytest.mark.parametrize(
    ("generation", "config", "template", "expected"),
    [
        (None, 1, "{{ messages }}", (1, 5)),
        ({"max_length": 9}, [1], "{{ messages }}", (1, 5)),
        ({"eos_token_id": None}, None, "{{ messages }}", (1, 5)),
        ({"eos_token_id": None}, None, None, (1,)),
        ({"eos_token_id": [1, 7]}, 1, "{{ messages }}", (1, 7)),
        (None, [5, 1], "{{ messages }}", (5, 1)),
        (None, 1, None, (1,)),
    ],
    ids=str,
)
def test_a_turn_ends_a_text_where_there_are_turns(
    folder: Path, generation: dict | None, config: object, template: str, expected: tuple[int, ...]
) -> None:
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    assert read_checkpoint(folder).eos_token_ids == expected


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_that_is_not_the_embedding_is_refused(folder: Path, *, is_equal: bool) -> None:
    """The reference unties such a head, although config.json says that it is tied."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0.0 if is_equal else 1.0
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight) == is_equal
    if is_equal:
        assert "lm_head.weight" not in read_checkpoint(folder).tensors
        return
    with pytest.raises(
        CheckpointError, match=r"expected lm_head\.weight equal to model\.embed_tok"
    ):
        read_checkpoint(folder)


def write_safetensors(file: Path, header: object, num_bytes: int = 32) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


def entry(start: object, end: object, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HALF = entry(0, 16)
BAD_HEADERS = {
    "negative offset": ({"a": entry(-16, 0), "b": HALF}, "the offsets of a as two whole numbers"),
    "end before start": ({"a": entry(16, 0)}, "the smaller one first, got [16, 0]"),
    "offset that is no number": ({"a": entry("0", 16)}, "the offsets of a as two whole numbers"),
    "offset of true": ({"a": entry(True, 16)}, "the offsets of a as two whole numbers"),
    "offset beyond the file": ({"a": entry(32, 48), "b": HALF}, "ends inside the tensor a"),
    "offset of 2^63": ({"a": entry(2**63, 2**63 + 16), "b": HALF}, "ends inside the tensor a"),
    "overlap": ({"a": HALF, "b": entry(8, 24)}, "bytes of its own, got a and b at the same"),
    "same bytes": ({"a": HALF, "b": HALF}, "bytes of its own, got a and b at the same"),
    "gap": ({"a": entry(0, 8, [2]), "b": entry(16, 32)}, "b right after a, got a gap of 8 bytes"),
    "bytes left over": ({"a": HALF}, "the end of the file after a, got 16 bytes more"),
    "shape unlike length": ({"a": entry(0, 32)}, "16 bytes of a for its shape [4], got 32"),
    "dimension of 0": ({"a": entry(0, 0, [0])}, "the shape of a as 1 to 8 numbers"),
    "negative dimension": ({"a": entry(0, 32, [-2, -4])}, "the shape of a as 1 to 8 numbers"),
    "dimension of 2^63": ({"a": entry(0, 32, [2**63])}, "the shape of a as 1 to 8 numbers"),
    "no shape": ({"a": {"dtype": "F32"}}, "expected dtype, shape and data_offsets of a"),
    "unknown type": ({"a": entry(0, 16, dtype="F4")}, "a as one of F32, F16, BF16, got 'F4'"),
    "type of another kind": ({"a": entry(0, 16, dtype=["F32"])}, "got ['F32']"),
    "entry that is no object": ({"a": 1}, "data_offsets of a, got 1"),
    "list": ([1], "expected a JSON object, got [1]"),
    "half a header": (b'{"a": {', "expected JSON, got Expecting property name"),
    "name twice": (b'{"a": 1, "a": 2}', "the key 'a' twice"),
    "no UTF-8": (b'{"\xff": 1}', "expected JSON, got 'utf-8' codec can't decode"),
    "deep": (b"[" * 100_000, "expected JSON, got too many brackets"),
    "long name": ({"a" * 5_000: HALF}, "names of 1 to 1,024 bytes"),
    "name of many lines": ({"a\nb": HALF}, "expected printable names"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = BAD_HEADERS[name]
    write_safetensors(tmp_path / "x.safetensors", content)
    with pytest.raises(CheckpointError) as raised:
        read_safetensors(tmp_path / "x.safetensors")
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "x.safetensors"))


def test_a_file_that_becomes_shorter_is_refused_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": entry(0, 32, [8])})
    [stored] = read_safetensors(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the end of the file, which has become shorter"):
        list(stored.chunks())


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "x.safetensors")
    [stored] = read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="expected finite numbers in a, got"):
        list(stored.chunks())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../x.safetensors", "got '../x.safetensors', which leads elsewhere"),
        ("/etc/passwd", "got '/etc/passwd', which leads elsewhere"),
        ("a/../../x", "got 'a/../../x', which leads elsewhere"),
        ("link.safetensors", "expected a file of the folder, got a symbolic link to"),
        ("loop.safetensors", "which is no path"),
        ("a\0b", "which is no path: embedded null byte"),
        ("x" * 400, "expected a safetensors file, got nothing"),
        ("", "expected the name of a file in it, got ''"),
        (7, "expected weight_map with the file of each tensor"),
    ],
)
def test_an_index_names_files_of_its_folder(folder: Path, name: object, sentence: str) -> None:
    (folder.parent / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to("../x.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    weight_map = {"model.norm.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE"]
)
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    """What it leads to would be copied into the model folder."""
    secret = folder.parent / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"got a symbolic link to .*/secret; copy the file"):
        read_checkpoint(folder).tokenizer_model()


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(
    folder: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copyfile(file, blobs / f"sum-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sum-of-{file.name}")
    checkpoint = read_checkpoint(snapshot)
    assert checkpoint.tensors.keys() == read_checkpoint(folder).tensors.keys()
    assert checkpoint.tokenizer_model() == (folder / "tokenizer.model").read_bytes()


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder, 2)
    one, two = sorted(folder.glob("model-*.safetensors"))
    shutil.copyfile(one, two)
    with pytest.raises(CheckpointError, match=r"expected one tensor for .*, got model\."):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "[" * 100_000, "config.json: expected JSON, got too many brackets"),
        ("config.json", '{"a": NaN}', "expected JSON, got NaN, which is no number"),
        ("config.json", "9" * 5_000, "config.json: expected JSON, got Exceeds the limit"),
        ("config.json", '"\\ud800"', "config.json: expected JSON, got 'utf-8' codec can't encode"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "as token ids below 300"),
        ("generation_config.json", '{"eos_token_id": true}', "token ids below 300, got True"),
        ("tokenizer_config.json", '{"chat_template": 7}', "expected chat_template as text, got 7"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "as token ids with"),
        ("tokenizer.json", '{"added_tokens": [{"id": 4}]}', "tokenizer.json: expected the added"),
        ("chat_template.jinja", b"\xff", "expected text in UTF-8"),
        ("chat_template.jinja", b"x" * (17 << 20), "expected at most 16,777,216 bytes"),
        ("LICENSE", b"x" * (2 << 20), "expected a text of at most 1,048,576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_settings_file_is_refused(
    folder: Path, file: str, content: str | bytes, sentence: str
) -> None:
    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read_checkpoint(folder).tokenizer_model()


def test_weights_unlike_the_config_are_refused_before_a_graph_is_made(
    folder: Path, tmp_path: Path
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"num_hidden_layers": 512, "layer_types": ["full_attention"] * 512}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"expected the tensor layers\."):
        export(folder, tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))
