"""Builds a SentencePiece model from `tokenizer.json`, where that is all a folder has.

Its list of pairs gives the scores of the pieces (`merge_scores.py`). Added tokens become the pieces
that a text matches before any merge.
"""

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError
from beam_gemma.model.tokenizer import BYTE, NORMAL, SPACE, USER_DEFINED
from export.checkpoints.merge_scores import merge_scores
from export.checkpoints.tokenizer_model import loaded, sentencepiece_model

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
TAB, TAB_BYTE = "\t", "<0x09>"
"""Older files have the tab under its character in place of its byte."""
EXPECTED: dict[str, tuple[Any, ...]] = {
    "normalizer": ({"type": "Replace", "pattern": {"String": " "}, "content": SPACE},),
    # No text has a space after the normalizer, so this splits nothing.
    "pre_tokenizer": (
        None,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
         "invert": False},
    ),
    "model.type": ("BPE",),
    "model.unk_token": ("<unk>",),
    "model.byte_fallback": (True,),
    "model.dropout": (None,),
    "model.ignore_merges": (False, None),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
}  # fmt: skip
"""Settings of a Gemma's file, each with the values that a SentencePiece model stands for."""


def sentencepiece_from_json(settings: Mapping[str, Any], file: Path, vocab_size: int) -> bytes:
    """Return the `tokenizer.model` that a `tokenizer.json` was made from.

    Args:
        settings: Content of the file.
        file: For messages.
        vocab_size: Rows of the embedding; added tokens that have none are left out.

    Raises:
        CheckpointError: the file is no Gemma's, or has no equal SentencePiece model.
    """
    model = settings.get("model")
    model = model if isinstance(model, Mapping) else {}
    for key, allowed in EXPECTED.items():
        value = model.get(key[6:]) if key.startswith("model.") else settings.get(key)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise CheckpointError(
                f"{file}: expected {key} as in Gemma's file, got {reprlib.repr(value)}; copy "
                "tokenizer.model beside it"
            )
    vocabulary, pairs = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(pairs, list):
        raise CheckpointError(f"{file}: expected vocab and merges in model, got others")
    added = dict(_added(settings, file, vocab_size))
    ids = vocabulary | added
    if sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
        raise CheckpointError(
            f"{file}: expected the ids of {len(ids):,} pieces from 0 on, each once, got others"
        )
    scores = merge_scores(vocabulary.keys() - added.keys(), pairs, file)
    pieces = sorted(ids, key=lambda piece: int(ids[piece]))
    names = [TAB_BYTE if p == TAB and TAB_BYTE not in ids else p for p in pieces]
    kinds = [
        BYTE if name in BYTES else USER_DEFINED if piece in added else NORMAL
        for name, piece in zip(names, pieces, strict=True)
    ]
    return loaded(file, sentencepiece_model(names, [scores.get(p, 0.0) for p in pieces], kinds))


def _added(settings: Mapping[str, Any], file: Path, vocab_size: int) -> Iterator[tuple[str, int]]:
    """Yield text and id of each added token, which text matches before any other piece."""
    tokens = settings.get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        token = token if isinstance(token, dict) else {}
        text, token_id = token.get("content"), token.get("id")
        strips = any(token.get(key) for key in ("lstrip", "rstrip", "single_word"))
        if not isinstance(text, str) or not text or type(token_id) is not int or strips:
            raise CheckpointError(
                f"{file}: expected added tokens with an id and a content that is matched as it "
                f"is, got {reprlib.repr(token)}"
            )
        if token_id < vocab_size:
            yield text, token_id
