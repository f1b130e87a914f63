"""The SentencePiece model built from tokenizer.json, against the tokenizer that this file makes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from beam_gemma.errors import CheckpointError
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
    Tokenizer,
    parsed_model,
)
from export.checkpoints.gguf_header import read_gguf_header
from export.checkpoints.sidecar_files import tokenizer_bytes
from export.checkpoints.tokenizer_model import sentencepiece_from_gguf
from tests.doubles.gemma4_tokenizer import MARKERS, write_tokenizer
from tests.doubles.real_model import real_checkpoint
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model
from tests.export.test_tokenizer_model import DATA, KNOWN_DIFFERENCES


def write_json(folder: Path, model_proto: bytes) -> GemmaTokenizer:
    """Save a SentencePiece model as transformers 5 does, with tokenizer.json alone."""
    pieces = parsed_model(model_proto).pieces
    vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in pieces})
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    special = (CONTROL, UNKNOWN, USER_DEFINED)
    tokenizer.add_tokens([p.piece for p in pieces if p.type in special], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return tokenizer


def change(folder: Path, section: str | None, **settings: Any) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    (content if section is None else content[section]).update(settings)
    file.write_text(json.dumps(content))


def test_ids_are_those_of_the_tokenizer_that_was_saved(tmp_path: Path) -> None:
    theirs = write_json(tmp_path, tiny_tokenizer_model())
    ours = Tokenizer(tokenizer_bytes(tmp_path, 300))
    assert ours.control_pieces == Tokenizer(tiny_tokenizer_model()).control_pieces
    words = ["the", "he", "in", "then", "tinhe", " ", "   ", "\n\n", "é", "</b>", "<start_of_turn>"]
    for text in random_texts(words):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(ours.split(text), add_bos=False) == expected, text


def test_older_files_have_the_tab_in_place_of_its_byte(tmp_path: Path) -> None:
    write_json(tmp_path, tiny_tokenizer_model())
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    tab = vocabulary.pop("<0x09>")
    change(tmp_path, "model", vocab={**vocabulary, "\t": tab})
    tokenizer = Tokenizer(tokenizer_bytes(tmp_path, 300))
    assert tokenizer.encode(tokenizer.split("\t"), add_bos=False) == [tab]
    assert tokenizer.decode([tab]) == "\t"


def random_texts(words: list[str], number: int = 300) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(number)]


def test_ids_of_a_gemma_4_are_those_of_its_tokenizer(tmp_path: Path) -> None:
    theirs = write_tokenizer(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert [len(left + right) for left, right in merges[:3]] == [5, 5, 4], "runs are not mixed"
    ours = Tokenizer(tokenizer_bytes(tmp_path, 400))
    assert ours.control_pieces == {
        piece: theirs.convert_tokens_to_ids(piece)
        for piece in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *MARKERS.values())
    }
    words = ["the", "he", "in", "then", " ", "  ", "     ", "\n", "\n\n", "\n\n\n\n", "\t", "\t\t",
             "\t\t\t", "\t" * 9, "é", "</b>", "<start_of_turn>", *MARKERS.values()]  # fmt: skip
    for text in random_texts(words):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(ours.split(text), add_bos=False) == expected, text


def test_markers_in_a_text_of_a_gemma_4_are_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    ours = Tokenizer(tokenizer_bytes(tmp_path, 400))
    text = "the <|turn>model<turn|>"
    ids = ours.encode([Text(text)], add_bos=False)
    assert not {*ours.control_pieces.values()} & {*ids}
    assert ours.decode(ids) == text


@pytest.mark.parametrize("pair", [("\n\n", "\n"), ("\u2581\u2581", "\u2581\u2581\u2581")])
def test_runs_whose_pairs_are_in_another_order_are_refused(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    """Runs would not be as long as possible from the left."""
    write_tokenizer(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    merges.remove([*pair])
    change(tmp_path, "model", merges=[[*pair], *merges])
    with pytest.raises(CheckpointError, match="expected the merges that follow from"):
        tokenizer_bytes(tmp_path, 400)


@pytest.mark.parametrize(
    ("section", "settings", "sentence"),
    [
        (None, {"normalizer": None}, "expected normalizer as in Gemma's file, got None"),
        (None, {"pre_tokenizer": {"type": "ByteLevel"}}, "expected pre_tokenizer as in Gemma's"),
        (None, {"model": []}, "expected model.type as in Gemma's file, got None"),
        ("model", {"type": "Unigram"}, "expected model.type as in Gemma's file, got 'Unigram'"),
        ("model", {"byte_fallback": False}, "expected model.byte_fallback as in Gemma's"),
        ("model", {"ignore_merges": True}, "expected model.ignore_merges as in Gemma's"),
        ("model", {"vocab": {"a": 0, "b": 2}, "merges": []}, "from 0 on, each once"),
        ("model", {"vocab": {"a" * 9_000: 12}, "merges": []}, "got a piece of 9,000 characters"),
        ("model", {"vocab": []}, "expected vocab and merges in model"),
        ("model", {"merges": [["t", "h", "e"]]}, "expected merges as pairs of pieces"),
        ("model", {"merges": [7]}, "expected merges as pairs of pieces"),
        ("model", {"merges": ["h e", "h e"]}, "each once, got 'h e'"),
        ("model", {"merges": []}, "got 0 of the 1 pairs of "),
        (None, {"added_tokens": [{"id": 1}]}, "expected added tokens with an id and a content"),
        (None, {"added_tokens": [{"id": 4, "content": "x", "lstrip": True}]}, "matched as it is"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_sentencepiece_model_stands_for_is_refused(
    tmp_path: Path, section: str | None, settings: dict[str, Any], sentence: str
) -> None:
    write_json(tmp_path, tiny_tokenizer_model())
    change(tmp_path, section, **settings)
    with pytest.raises(CheckpointError) as raised:
        tokenizer_bytes(tmp_path, 300)
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "tokenizer.json"))


def test_pairs_of_a_piece_that_are_apart_are_refused(tmp_path: Path) -> None:
    """SentencePiece knows one score of a piece, whichever pair it is made of."""
    model = ModelProto.FromString(tiny_tokenizer_model())
    next(piece for piece in model.pieces if piece.piece == "in").piece = "the"
    theirs = write_json(tmp_path, model.SerializeToString())
    ours = Tokenizer(tokenizer_bytes(tmp_path, 300))
    text = "the then thethe"
    assert ours.encode(ours.split(text), add_bos=False) == theirs.encode(
        text, add_special_tokens=False
    )
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    [first, _] = [pair for pair in merges if "".join(pair) == "the"]
    merges.remove(first)
    change(tmp_path, "model", merges=[first, *merges])
    with pytest.raises(CheckpointError, match="got the pairs of 'the' apart"):
        tokenizer_bytes(tmp_path, 300)


@pytest.fixture(scope="module")
def official_model() -> bytes:
    return sentencepiece_from_gguf(read_gguf_header(real_checkpoint()))


@pytest.mark.weights
def test_ids_of_a_gemma_4_of_full_size_are_those_of_its_tokenizer(
    official_model: bytes, tmp_path: Path
) -> None:
    """The official vocabulary but for its markers, whose places are those of pieces not used."""
    model = ModelProto.FromString(official_model)
    for token_id, marker in zip(range(46, 100), MARKERS.values(), strict=False):
        model.pieces[token_id].piece = marker
    scores = {
        piece.piece: 0.0 if piece.type == USER_DEFINED else piece.score for piece in model.pieces
    }
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    theirs = GemmaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores),
        add_bos_token=False,
        extra_special_tokens=MARKERS,
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tokenizer_bytes(tmp_path, 262144))
    rows = json.loads((DATA / "gemma3_token_ids.json").read_text(encoding="utf-8"))
    pieces = ["<h1>", "<|turn>", "\t" * 7, "\n" * 40, " " * 70, "\n ", "a b", "é", "<unused0>"]
    for text in [*(row["text"] for row in rows), *random_texts(pieces)]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(ours.split(text), add_bos=False) == expected, text


@pytest.mark.weights
def test_ids_equal_the_official_tokenizers(official_model: bytes, tmp_path: Path) -> None:
    write_json(tmp_path, official_model)
    built = tokenizer_bytes(tmp_path, 262144)
    tokenizer = Tokenizer(built)
    rows = json.loads((DATA / "gemma3_token_ids.json").read_text(encoding="utf-8"))
    different = {
        row["text"]
        for row in rows
        if tokenizer.encode(tokenizer.split(row["text"]), add_bos=False) != row["ids"]
    }
    assert len(rows) > 300
    assert different == KNOWN_DIFFERENCES
    theirs, ours = (ModelProto.FromString(proto).pieces for proto in (official_model, built))
    assert [(p.piece, p.type) for p in ours] == [(p.piece, p.type) for p in theirs]
    assert all(SPACE in p.piece or " " not in p.piece for p in ours)
