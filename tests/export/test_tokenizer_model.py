"""The SentencePiece model built from a GGUF vocabulary, against ids of the official tokenizer."""

import json
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFValueType, GGUFWriter

from beam_gemma.errors import CheckpointError
from beam_gemma.model.markup import Control, Text
from beam_gemma.model.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    ModelProto,
    Tokenizer,
)
from export.checkpoints.gguf_header import read_gguf_header
from export.checkpoints.tokenizer_model import sentencepiece_from_gguf, sentencepiece_model
from tests.doubles.real_model import real_checkpoint

DATA = Path(__file__).parents[1] / "data"
# SentencePiece writes spaces as U+2581 and cannot tell them from the character itself; the official
# tokenizer looks for runs of spaces before it writes them so.
KNOWN_DIFFERENCES = {f" {SPACE}{SPACE} "}

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "  ", "b"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
TYPES = [CONTROL] * 5 + [USER_DEFINED, NORMAL] + [BYTE] * 256
SCORES = [-1.0] * len(PIECES)


def test_types_are_the_official_models() -> None:
    model = ModelProto.FromString(sentencepiece_model(PIECES, SCORES, TYPES))
    assert [piece.piece for piece in model.pieces][4:6] == ["<start_of_turn>", SPACE * 2]
    assert [piece.type for piece in model.pieces][:8] == [3, 3, 3, 2, 4, 4, 1, 6]


def test_special_ids_are_found_by_name() -> None:
    pieces, types = PIECES[3::-1] + PIECES[4:], TYPES[3::-1] + TYPES[4:]
    model = sentencepiece_model(pieces, SCORES, types)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.unk_id() == 0
    assert (processor.bos_id(), processor.eos_id(), processor.pad_id()) == (1, 2, 3)


def test_a_vocabulary_without_a_special_piece_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected Gemma's piece <bos>, got none"):
        sentencepiece_model(["<unk>"], [0.0], [2])


def test_a_file_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = sentencepiece_from_gguf(read_gguf_header(tmp_path / "tiny.gguf"))
    assert model == sentencepiece_model(PIECES, SCORES, TYPES)


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"expected the key tokenizer\.ggml\.tokens"):
        sentencepiece_from_gguf(read_gguf_header(tmp_path / "tiny.gguf"))


@pytest.fixture(scope="session")
def gemma3_tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece_from_gguf(read_gguf_header(real_checkpoint())))


@pytest.fixture(scope="session")
def official_ids() -> dict[str, list[int]]:
    rows = json.loads((DATA / "gemma3_token_ids.json").read_text(encoding="utf-8"))
    return {row["text"]: row["ids"] for row in rows}


@pytest.mark.weights
def test_ids_equal_the_official_tokenizers(
    gemma3_tokenizer: Tokenizer, official_ids: dict[str, list[int]]
) -> None:
    tokenizer = gemma3_tokenizer
    different = {
        text
        for text, ids in official_ids.items()
        if tokenizer.encode(tokenizer.split(text), add_bos=False) != ids
    }
    assert len(official_ids) > 300
    assert different == KNOWN_DIFFERENCES


@pytest.mark.weights
def test_official_ids_decode_to_their_text(
    gemma3_tokenizer: Tokenizer, official_ids: dict[str, list[int]]
) -> None:
    for text, ids in official_ids.items():
        parts = gemma3_tokenizer.split(text.replace(SPACE, " "))
        expected = "".join(part.text for part in parts if isinstance(part, Text))
        assert gemma3_tokenizer.decode(ids) == expected


@pytest.mark.weights
def test_text_never_yields_a_control_token(
    gemma3_tokenizer: Tokenizer, official_ids: dict[str, list[int]]
) -> None:
    control_ids = set(gemma3_tokenizer.control_pieces.values())
    for text in [*official_ids, *gemma3_tokenizer.control_pieces]:
        ids = gemma3_tokenizer.encode([Text(text)], add_bos=False)
        assert not control_ids & set(ids)
        assert gemma3_tokenizer.decode(ids) == text.replace(SPACE, " ")


@pytest.mark.weights
def test_control_pieces_are_gemmas(gemma3_tokenizer: Tokenizer) -> None:
    pieces = gemma3_tokenizer.control_pieces
    assert len(pieces) == 6252
    assert (pieces["<start_of_turn>"], pieces["<end_of_turn>"]) == (105, 106)
    assert (pieces["<start_of_image>"], pieces["<end_of_image>"]) == (255999, 256000)
    assert gemma3_tokenizer.encode([Control("[multimodal]")]) == [2, 5]


@pytest.mark.parametrize(
    ("key", "values", "sentence"),
    [
        ("tokens", [1, 2, 3], "expected tokenizer.ggml.tokens as strings, got"),
        ("scores", [-1.0], "expected tokenizer.ggml.scores as 263 numbers, one for each piece"),
        ("scores", [float("nan")] * len(PIECES), "a SentencePiece model with finite scores"),
        ("scores", ["x"] * len(PIECES), "expected tokenizer.ggml.scores as numbers"),
        ("token_type", [9] * len(PIECES), "numbers from 1 to 6, got [9]"),
        ("token_type", [1.0] * len(PIECES), "numbers from 1 to 6, got [1.0]"),
        ("tokens", ["<pad>"] * 4 + PIECES[4:], "expected Gemma's piece <unk>, got none"),
        ("tokens", [*PIECES[:-1], "b"], "with another text for each piece"),
    ],
)
def test_a_damaged_vocabulary_is_refused(
    tmp_path: Path, key: str, values: list[object], sentence: str
) -> None:
    lists: dict[str, list[object]] = {
        "tokens": [*PIECES],
        "scores": [*SCORES],
        "token_type": [*TYPES],
    }
    writer = GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    for name, items in (lists | {key: values}).items():
        writer.add_array(f"tokenizer.ggml.{name}", items)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as raised:
        sentencepiece_from_gguf(read_gguf_header(tmp_path / "tiny.gguf"))
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"), [("model", "gpt2"), ("add_space_prefix", True), ("add_eos_token", True)]
)
def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path, key: str, value: object) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    full = f"tokenizer.ggml.{key}"
    writer.add_key_value(full, value, GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=rf"expected {full} as .* got {value!r}"):
        sentencepiece_from_gguf(read_gguf_header(tmp_path / "tiny.gguf"))
