"""Ids of text and markup, and text of ids, on a vocabulary of 300 pieces."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import ArtifactError, RecordError
from beam_gemma.model.markup import Control, Part, Text
from beam_gemma.model.tokenizer import (
    CONTROL,
    HTML_TAG,
    SPACE,
    UNKNOWN,
    ModelProto,
    StreamingDecoder,
    Tokenizer,
)
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

MODEL = tiny_tokenizer_model()
TOKENIZER = Tokenizer(MODEL)
IDS = TOKENIZER.control_pieces
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE))
MARKUP = st.lists(st.sampled_from([*IDS, "the ", "<", "end_of_turn", ">", "\n\n\n\n", "é"]))


def test_special_ids_are_the_models() -> None:
    assert TOKENIZER.vocab_size == 300
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (0, 1, 2)


def test_markers_are_control_pieces_and_tags_and_spaces_are_text() -> None:
    assert IDS == {
        "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3,
        "<start_of_turn>": 4, "<end_of_turn>": 5, "<start_of_image>": 6,
    }  # fmt: skip


@pytest.mark.parametrize("tag", ["<a>", "</h6>", "<blockquote>", "</footer>", "<s>", "</s>"])
def test_a_tag_of_gemmas_list_is_text(tag: str) -> None:
    assert HTML_TAG.fullmatch(tag)


@pytest.mark.parametrize("piece", ["<bos>", "<h7>", "<p>", "< a>", "<mask>", "</end_of_turn>"])
def test_a_marker_is_no_tag(piece: str) -> None:
    assert HTML_TAG.fullmatch(piece) is None


@given(TEXT)
def test_text_survives_and_yields_no_control_token(text: str) -> None:
    ids = TOKENIZER.encode([Text(text)], add_bos=False)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & set(IDS.values())


@given(MARKUP)
def test_markup_encodes_as_the_official_model_does(pieces: list[str]) -> None:
    """There, markers are user-defined pieces; the four special ones never match text."""
    official = sentencepiece.SentencePieceProcessor(model_proto=user_defined(MODEL))
    text = "".join(pieces)
    assert TOKENIZER.encode(TOKENIZER.split(text), add_bos=False) == official.encode(text)


def user_defined(model_proto: bytes) -> bytes:
    """Let the special pieces match text as well, as tokenizers for markup do."""
    model = ModelProto.FromString(model_proto)
    for piece in model.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            piece.type = 4
    model.pieces.add(piece="<unused>", type=UNKNOWN)
    model.trainer_spec.unk_piece = "<unused>"
    return bytes(model.SerializeToString())


def test_bos_comes_once() -> None:
    text = TOKENIZER.encode([Text("the")], add_bos=False)
    assert TOKENIZER.encode([Text("the")]) == [2, *text]
    assert TOKENIZER.encode([Control("<bos>"), Text("the")]) == [2, *text]
    assert TOKENIZER.encode([Text(""), Control("<bos>"), Text("the")]) == [2, *text]
    assert TOKENIZER.encode([]) == [2]
    assert TOKENIZER.encode([Control("<end_of_turn>")]) == [2, 5]


@given(st.text("the in\n"), st.data())
def test_ids_do_not_depend_on_where_parts_meet(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    assert TOKENIZER.encode([Text(text[:cut]), Text(text[cut:])]) == TOKENIZER.encode([Text(text)])


def test_control_pieces_have_no_text_and_spaces_stay() -> None:
    parts: list[Part] = [Control("<start_of_turn>"), Text("  the  "), Control("<end_of_turn>")]
    assert TOKENIZER.decode(TOKENIZER.encode(parts)) == "  the  "


def test_a_row_beyond_the_vocabulary_has_no_text() -> None:
    assert TOKENIZER.decode([300, 301]) == ""


def test_half_a_surrogate_pair_is_that_rows_error() -> None:
    with pytest.raises(RecordError, match="half of a surrogate pair at character 2"):
        TOKENIZER.encode([Text("ab\ud83d")])


def test_fields_that_are_not_described_survive(tmp_path: Path) -> None:
    """`accept_language`, field 5 of the trainer's settings, is not described."""
    model = ModelProto.FromString(MODEL)
    model.trainer_spec.MergeFromString(b"\x2a\x02en")
    assert b"\x2a\x02en" in ModelProto.FromString(model.SerializeToString()).SerializeToString()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    assert Tokenizer.from_file(path).vocab_size == 300


@pytest.mark.parametrize("content", [None, b"", b"not a model", MODEL[:-50]])
def test_a_damaged_file_is_an_artifact_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.model: expected a SentencePiece model"):
        Tokenizer.from_file(path)


def changed(change: Callable[[Any], object]) -> bytes:
    model = ModelProto.FromString(MODEL)
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (bytes(17 << 20), "of at most 16,777,216 bytes, got 17,825,792"),
        (changed(lambda m: m.pieces.add(piece="th")), "with another text for each piece"),
        (changed(lambda m: m.pieces.add(piece="")), "with another text for each piece"),
        (MODEL.replace("\u2581the".encode(), b"\xff\xfe\xfdthe"), "another text for each piece"),
        (changed(lambda m: setattr(m.pieces[9], "score", math.nan)), "with finite scores"),
        (changed(lambda m: setattr(m.trainer_spec, "model_type", 1)), "of byte pairs (type 2)"),
        (changed(lambda m: setattr(m.pieces[9], "type", 99)), "with pieces of types 1 to 6"),
        (changed(lambda m: setattr(m.trainer_spec, "bos_piece", "x")), "with <bos>, got none"),
        (changed(lambda m: setattr(m.trainer_spec, "eos_piece", "x")), "with <eos>, got none"),
        (changed(lambda m: m.pieces.__delitem__(slice(3, None))), "got an error: RuntimeError"),
    ],
    ids=range(10),
)
def test_a_model_that_would_not_work_is_refused(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as raised:
        Tokenizer.from_file(path)
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(f"{path}: expected a SentencePiece model")


class TestStreamingDecoder:
    @given(st.lists(st.integers(0, 299)))
    def test_chunks_make_the_whole(self, ids: list[int]) -> None:
        decoder = StreamingDecoder(TOKENIZER)
        chunks = [decoder.add(token_id) for token_id in ids]
        assert decoder.text == "".join(chunks)
        assert "".join(chunks) + decoder.finish() == TOKENIZER.decode(ids)

    @given(TEXT, TEXT)
    def test_text_so_far_is_never_taken_back(self, first: str, second: str) -> None:
        decoder = StreamingDecoder(TOKENIZER)
        for token_id in TOKENIZER.encode([Text(first)]):
            decoder.add(token_id)
        assert decoder.text == first
        for token_id in TOKENIZER.encode([Text(second)], add_bos=False):
            before = decoder.text
            decoder.add(token_id)
            assert decoder.text.startswith(before)
        assert decoder.text == first + second

    def test_an_unfinished_character_is_held_back(self) -> None:
        decoder = StreamingDecoder(TOKENIZER)
        euro = TOKENIZER.encode([Text("a€")], add_bos=False)
        assert [decoder.add(token_id) for token_id in euro] == ["a", "", "", "€"]
        assert decoder.finish() == ""

    def test_bytes_of_no_character_are_replaced_at_the_end(self) -> None:
        decoder = StreamingDecoder(TOKENIZER)
        decoder.add(TOKENIZER.encode([Text("é")])[1])
        assert decoder.text == ""
        assert decoder.finish() == decoder.text == "\ufffd"

    def test_cost_is_linear(self) -> None:
        assert seconds(64_000) < 16 * seconds(8_000)


def seconds(num_tokens: int) -> float:
    """Return the best time of three to stream so many tokens."""
    times = []
    for _ in range(3):
        decoder = StreamingDecoder(TOKENIZER)
        start = time.perf_counter()
        for _ in range(num_tokens):
            decoder.add(270)
        assert len(decoder.text) >= num_tokens
        times.append(time.perf_counter() - start)
    return min(times)
