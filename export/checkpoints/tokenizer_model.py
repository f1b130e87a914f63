"""Builds a SentencePiece model from the vocabulary of a GGUF file.

GGUF keeps pieces, types and scores, or in Gemma 4 pairs of pieces, and drops the rest of
`tokenizer.model`: text normalization and the special pieces. These are the same for every Gemma:
byte-pair encoding with byte fallback for unknown characters, and no normalization.
"""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beam_gemma.errors import ArtifactError, CheckpointError
from beam_gemma.model.tokenizer import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    SPECIAL_PIECES,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
    Tokenizer,
)
from export.checkpoints.gguf_header import GgufFile
from export.checkpoints.gguf_keys import EMBEDDER
from export.checkpoints.merge_scores import merge_scores

PIECE_TYPES = range(NORMAL, BYTE + 1)
SCORED, PAIRED = "llama", "gemma4"
"""Kinds of vocabularies: with a score for each piece, and with the pairs of pieces in order."""
SETTINGS: dict[str, tuple[str | bool, ...]] = {
    "model": (SCORED, PAIRED),
    "add_space_prefix": (False,),
    "remove_extra_whitespaces": (False,),
}
"""What a vocabulary says of itself where it is Gemma's, or says nothing."""
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<turn|>", "<|tool_response>")
"""Pieces of Gemma and ChatML that end a chat turn, and so the output of a chat model. The response
of a tool is for others to write."""


def sentencepiece_from_gguf(file: GgufFile) -> bytes:
    """Return a `tokenizer.model` with the ids of the official one.

    Raises:
        CheckpointError: the file has no SentencePiece vocabulary of Gemma.
    """
    adds_end = file.value("general.architecture", None) == EMBEDDER
    settings = SETTINGS | {"add_eos_token": (False, True) if adds_end else (False,)}
    for key, allowed in settings.items():
        if (value := file.value(f"tokenizer.ggml.{key}", allowed[0])) not in allowed:
            raise CheckpointError(
                f"{file.path}: expected tokenizer.ggml.{key} as {' or '.join(map(repr, allowed))}, "
                f"as Gemma's SentencePiece model has it, got {reprlib.repr(value)}"
            )
    pieces = strings(file, "tokenizer.ggml.tokens")
    types = _numbers(file, "token_type", len(pieces))
    if not all(type(kind) is int and kind in PIECE_TYPES for kind in types):
        raise CheckpointError(
            f"{file.path}: expected tokenizer.ggml.token_type as numbers from {NORMAL} to {BYTE}, "
            f"got {reprlib.repr(sorted(set(types)))}"
        )
    return loaded(file.path, sentencepiece_model(pieces, _scores(file, pieces, types), types))


def _scores(file: GgufFile, pieces: Sequence[str], types: Sequence[int]) -> list[float]:
    """Return the score of each piece, which in a Gemma 4 follows from the pairs of pieces."""
    if file.value("tokenizer.ggml.model", SCORED) == SCORED:
        scores = _numbers(file, "scores", len(pieces))
        if not all(isinstance(score, float | int) for score in scores):
            raise CheckpointError(
                f"{file.path}: expected tokenizer.ggml.scores as numbers, got "
                f"{reprlib.repr(scores)}"
            )
        return scores
    cut_out = (CONTROL, UNKNOWN, USER_DEFINED)
    merged = {piece for piece, kind in zip(pieces, types, strict=True) if kind not in cut_out}
    found = merge_scores(merged, strings(file, "tokenizer.ggml.merges"), file.path)
    return [found.get(piece, 0.0) for piece in pieces]


def _numbers(file: GgufFile, name: str, count: int) -> list[Any]:
    """Return one value of the vocabulary for each piece."""
    values = file.value(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or len(values) != count:
        raise CheckpointError(
            f"{file.path}: expected tokenizer.ggml.{name} as {count:,} numbers, one for each "
            f"piece, got {reprlib.repr(values)}"
        )
    return values


def turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of the pieces that end a chat turn, if the vocabulary has any."""
    pieces = tokenizer.control_pieces
    return tuple(pieces[piece] for piece in TURN_ENDS if piece in pieces)


def loaded(file: Path, model: bytes) -> bytes:
    """Return the bytes of a SentencePiece model, if it loads.

    Raises:
        CheckpointError: it does not.
    """
    try:
        Tokenizer(model)
    except ArtifactError as error:
        raise CheckpointError(f"{file}: {error}; copy the file again") from error
    return model


def strings(file: GgufFile, key: str, *default: list[str]) -> list[str]:
    """Return a list of strings in the metadata, or the default.

    Raises:
        CheckpointError: there is none of that key, and no default.
    """
    values = file.value(key, *default)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path}: expected {key} as strings, got {reprlib.repr(values)}")
    return values


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
            raise CheckpointError(f"vocabulary: expected Gemma's piece {piece}, got none")
        token_id = pieces.index(piece)
        model.pieces[token_id].type = UNKNOWN if name == "unk" else CONTROL
        setattr(spec, f"{name}_id", token_id)
        setattr(spec, f"{name}_piece", piece)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
