"""Builds a SentencePiece model from the vocabulary of a GGUF file.

GGUF keeps pieces, scores and types, and drops the rest of `tokenizer.model`: text normalization and
the special pieces. These are the same for every Gemma: byte-pair encoding with byte fallback for
unknown characters, and no normalization.
"""

from collections.abc import Sequence

from gguf import GGUFReader

from beam_gemma.errors import CheckpointError
from beam_gemma.model.tokenizer import (
    CONTROL,
    SPACE,
    SPECIAL_PIECES,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
)

BPE = 2
"""SentencePiece's number for byte-pair encoding."""
END_OF_TURN = "<end_of_turn>"
"""Piece that ends a chat turn, and so the output of an instruction-tuned model."""


def sentencepiece_from_gguf(reader: GGUFReader) -> bytes:
    """Return a `tokenizer.model` with the ids of the official one.

    Raises:
        CheckpointError: the file has no SentencePiece vocabulary of Gemma.
    """
    pieces, scores, types = (
        _values(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    return sentencepiece_model(pieces, scores, types)


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> bytes:
    """Return a `tokenizer.model` of these pieces; types are numbered as in GGUF.

    Raises:
        CheckpointError: one of Gemma's special pieces is missing.
    """
    model = ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        # GGUF has plain spaces in runs of spaces; the model's pieces have SPACE instead.
        name = piece.replace(" ", SPACE) if kind == USER_DEFINED else piece
        # In the official model, all markers but the four special pieces match text.
        model.pieces.add(
            piece=name, score=score, type=USER_DEFINED if kind == CONTROL else int(kind)
        )
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = BPE, len(pieces), True
    for name in SPECIAL_PIECES:
        piece = f"<{name}>"
        if piece not in pieces:
            raise CheckpointError(f"GGUF vocabulary: expected Gemma's piece {piece}, got none")
        token_id = pieces.index(piece)
        model.pieces[token_id].type = UNKNOWN if name == "unk" else CONTROL
        setattr(spec, f"{name}_id", token_id)
        setattr(spec, f"{name}_piece", piece)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())


def _values(reader: GGUFReader, key: str) -> list:  # type: ignore[type-arg]
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"GGUF metadata: expected the key {key}, got none")
    return field.contents()
