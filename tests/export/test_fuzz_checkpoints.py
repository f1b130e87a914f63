"""Damaged checkpoints of each format: read in full or refused in a sentence, within bounds."""

import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import ModelProto, Tokenizer
from export.checkpoints import ckpt_file
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.released_sizes import Size
from export.checkpoints.sidecar_files import tokenizer_bytes
from export.checkpoints.tensors import Checkpoint
from tests.doubles.checkpoint_files import (
    MINI,
    gguf_numbers,
    shard,
    state_dict,
    write_ckpt,
    write_gguf,
    write_mini,
)
from tests.doubles.damage import damaged, damaged_json, judged
from tests.doubles.gemma4_tokenizer import write_tokenizer
from tests.doubles.gguf_models import MODELS, newer_model, write_model
from tests.doubles.reference import FULL, SLIDING
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

SEED, CASES = 16, 400
Damage = Callable[[bytes, random.Random], bytes]
ZIP_NUMBERS = {
    b"PK\1\2": [(8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)],
    b"PK\3\4": [(6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\5\6": [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}
"""Place and width of the numbers behind each signature of a zip archive."""
NUMBER_WIDTHS = {"BININT": 4, "BININT1": 1, "BININT2": 2, "BINPUT": 1, "BINGET": 1,
                 "BINUNICODE": 4}  # fmt: skip


class Files:
    """A folder in which one file at a time is damaged."""

    def __init__(
        self, folder: Path, damage: dict[str, Damage], read: Callable[[Path], object]
    ) -> None:
        self._folder, self._damage, self._read = folder, damage, read
        self._intact = {name: (folder / name).read_bytes() for name in damage}
        read(folder)

    def case(self, rng: random.Random) -> tuple[str, bytes]:
        """Return the name of a file and its damaged content."""
        name = rng.choice(list(self._damage))
        return name, self._damage[name](self._intact[name], rng)

    def read(self, case: tuple[str, bytes]) -> None:
        """Read the folder with that file in the place of the intact one."""
        name, content = case
        (self._folder / name).write_bytes(content)
        try:
            self._read(self._folder)
        finally:
            (self._folder / name).write_bytes(self._intact[name])


def read_whole(checkpoint: Checkpoint) -> None:
    """Read all that an export does; only whole, finite tensors and a working tokenizer count."""
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    for stored in checkpoint.tensors.values():
        numbers = np.concatenate(list(stored.chunks()))
        assert numbers.shape == stored.shape
        assert np.isfinite(numbers).all()
    use(Tokenizer(checkpoint.tokenizer_model()))


def use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([Text("the thin\u00e9 <eos> \U0001f600 ")])
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    tokenizer.decode(ids)
    assert len(tokenizer.vocabulary()) == tokenizer.vocab_size


def as_json(content: bytes, rng: random.Random) -> bytes:
    return damaged_json(json.loads(content), rng)


def as_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Damage the bytes, or what the header says."""
    if rng.random() < 0.3:
        return damaged(content, rng, [(0, 8)])
    (length,) = struct.unpack("<Q", content[:8])
    header = damaged_json(json.loads(content[8 : 8 + length]), rng)
    if rng.random() < 0.5:  # the same length as before, so that data keeps its place
        header = header.ljust(length)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def as_tokenizer(content: bytes, rng: random.Random) -> bytes:
    """Damage the bytes, or a piece or a setting of the model."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    model = ModelProto.FromString(content)
    piece, other = rng.choice(model.pieces), rng.choice(model.pieces)
    number = rng.choice([-1, 0, 1, 2, 3, 4, 5, 6, 7, 300, 2**31 - 1, -(2**31)])
    action = rng.randrange(7)
    if action == 0:
        piece.type = number
    elif action == 1:
        piece.score = rng.choice([float("nan"), float("inf"), -1e38, 0.0])
    elif action == 2:
        piece.piece = rng.choice([other.piece, "", "\0", "<0xGG>", "<0x00>", "x" * 3_000])
    elif action == 3:
        name = rng.choice(["model_type", "vocab_size", "unk_id", "bos_id", "eos_id", "pad_id"])
        setattr(model.trainer_spec, name, number)
    elif action == 4:
        name = rng.choice(["unk_piece", "bos_piece", "eos_piece", "pad_piece"])
        setattr(model.trainer_spec, name, rng.choice(["", "x", other.piece]))
    elif action == 5:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    else:  # the normalizer's compiled rules, which no Gemma has
        rules = rng.randbytes(rng.choice([1, 4, 100]))
        model.normalizer_spec.MergeFromString(b"\x12" + bytes([len(rules)]) + rules)
    return bytes(model.SerializeToString())


def as_zip(content: bytes, rng: random.Random) -> bytes:
    """Damage the archive, or the pickle in an intact one."""
    if rng.random() < 0.5:
        places = [
            (found.start() + place, width)
            for signature, numbers in ZIP_NUMBERS.items()
            for found in re.finditer(signature, content)
            for place, width in numbers
        ]
        return damaged(content, rng, places)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = damaged(data, rng, pickle_numbers(data))
            new.writestr(info.filename, data)
    return result.getvalue()


def pickle_numbers(data: bytes) -> list[tuple[int, int]]:
    found = ((code.name, place) for code, _, place in pickletools.genops(data) if place is not None)
    return [(place + 1, NUMBER_WIDTHS[n]) for n, place in found if n in NUMBER_WIDTHS]


def gguf_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    checkpoint = write_mini(folder / "mini")
    pieces = ModelProto.FromString(tiny_tokenizer_model()).pieces
    vocabulary = [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces]
    packed = "layers.0.mlp.up_proj.weight"
    path = write_gguf(folder / "x.gguf", checkpoint, vocabulary=vocabulary, packed=packed)
    numbers = gguf_numbers(path)
    length = max(place + width for place, width in numbers)

    def damage(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:  # in the header alone
            return damaged(content[:length], rng, numbers) + content[length:]
        return damaged(content, rng, numbers)

    return Files(folder, {"x.gguf": damage}, lambda f: read_whole(read_checkpoint(f / "x.gguf")))


def newer_gguf_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    """Two layers of a Gemma 3n, whose architecture is read from its tensors too."""
    small = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 0,
             "intermediate_size": [32, 64], "activation_sparsity_pattern": [0.95, 0.0],
             "vocab_size_per_layer_input": 300}  # fmt: skip
    raw = MODELS["3n"] | small
    write_tokenizer(folder)
    path = write_model(folder / "x.gguf", newer_model("3n", **small), raw, vocabulary=folder,
                       kind=GGMLQuantizationType.Q4_0)  # fmt: skip
    numbers = gguf_numbers(path)
    length = max(place + width for place, width in numbers)

    def damage(content: bytes, rng: random.Random) -> bytes:
        return damaged(content[:length], rng, numbers) + content[length:]

    return Files(folder, {"x.gguf": damage}, lambda f: read_whole(read_checkpoint(f / "x.gguf")))


def tokenizer_json_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    write_tokenizer(folder)
    return Files(
        folder,
        {"tokenizer.json": as_json},
        lambda f: use(Tokenizer(tokenizer_bytes(f, 400))),
    )


def folder_files(*damage: tuple[str, Damage]) -> Callable[[Path, pytest.MonkeyPatch], Files]:
    def files(folder: Path, _: pytest.MonkeyPatch) -> Files:
        write_mini(folder / "x")
        if any("index" in name for name, _ in damage):
            shard(folder / "x", 2)
        for name, content in {
            "tokenizer_config.json": {
                "added_tokens_decoder": {"4": {"content": "<x>"}},
                "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            },
            "generation_config.json": {"eos_token_id": [1, 5]},
        }.items():
            (folder / "x" / name).write_text(json.dumps(content))
        return Files(folder / "x", dict(damage), lambda f: read_whole(read_checkpoint(f)))

    return files


def ckpt_files(folder: Path, patch: pytest.MonkeyPatch) -> Files:
    patch.setattr(ckpt_file, "SIZES", (Size(name="mini", raw=MINI),))
    write_ckpt(folder, state_dict(write_mini(folder / "mini")))
    return Files(
        folder, {"tiny.ckpt": as_zip}, lambda f: read_whole(read_checkpoint(f / "tiny.ckpt"))
    )


def adapter_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    base = write_mini(folder / "mini")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": np.ones((2, 32)), f"{name}B.weight": np.ones((8, 2))}
    safetensors.numpy.save_file(
        {name: factor.astype(np.float32) for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "lora_alpha": 4, "use_rslora": True, "r": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    damage = {"adapter_config.json": as_json, "adapter_model.safetensors": as_safetensors}
    return Files(folder, damage, lambda f: read_whole(merge_adapter(base, f)))


def sentence_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    write_mini(folder / "x")
    types = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    contents: dict[str, object] = {
        "modules.json": [
            {"idx": i, "type": f"sentence_transformers.models.{t}", "path": path}
            for i, (t, path) in enumerate(types.items())
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": True},
        "2_Dense/config.json": {
            "in_features": 32, "out_features": 16, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "tokenizer_config.json": {"add_bos_token": True, "model_max_length": 64},
        "tokenizer.json": {"post_processor": {"single": [{"SpecialToken": {"id": "<eos>"}}]}},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / "x" / name).parent.mkdir(exist_ok=True)
        (folder / "x" / name).write_text(json.dumps(content))
    dense = {"linear.weight": np.ones((16, 32), np.float32)}
    safetensors.numpy.save_file(dense, folder / "x/2_Dense/model.safetensors")
    damage = dict.fromkeys(contents, as_json) | {"2_Dense/model.safetensors": as_safetensors}
    return Files(folder / "x", damage, lambda f: read_whole(read_checkpoint(f)))


def tokenizer_files(folder: Path, _: pytest.MonkeyPatch) -> Files:
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    return Files(
        folder,
        {"tokenizer.model": as_tokenizer},
        lambda f: use(Tokenizer.from_file(f / "tokenizer.model")),
    )


FORMATS = {
    "gguf": gguf_files,
    "safetensors": folder_files(("model.safetensors", as_safetensors)),
    "sharded index": folder_files(("model.safetensors.index.json", as_json)),
    "config.json": folder_files(("config.json", as_json)),
    "files beside": folder_files(
        ("tokenizer_config.json", as_json),
        ("generation_config.json", as_json),
        ("tokenizer.model", as_tokenizer),
    ),
    "sentence folder": sentence_files,
    "adapter": adapter_files,
    "ckpt": ckpt_files,
    "tokenizer.model": tokenizer_files,
    "tokenizer.json": tokenizer_json_files,
    "gguf of a Gemma 3n": newer_gguf_files,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_in_full_or_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, rng = FORMATS[name](tmp_path, monkeypatch), random.Random(SEED)
    counts = judged((files.case(rng) for _ in range(CASES)), files.read)
    assert counts.total() == CASES
    # Damage that is found, and damage that makes no difference: both kinds are among the cases.
    assert min(counts["refused"], counts["read"]) > CASES // 50, counts
