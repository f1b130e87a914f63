"""Scores of a SentencePiece model, from the pairs of pieces that a byte-pair tokenizer merges.

A list of pairs was made from a SentencePiece model: each piece became all pairs of pieces that make
it up, in the order of the pieces' scores. So the order of the pairs gives the scores back. A list
of which that is not true has no equal SentencePiece model, and is refused.
"""

import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import takewhile
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError
from beam_gemma.model.tokenizer import SPACE

MAX_PIECE_CHARS = 128
"""Longest piece, as each place at which one divides is looked at; Gemma's have at most 32."""
Pair = tuple[str, str]


def merge_scores(pieces: Set[str], pairs: Sequence[Any], file: Path) -> dict[str, float]:
    """Return the scores under which SentencePiece merges the same pairs in the same order.

    Args:
        pieces: All but those that are cut out of a text before any merge.
        pairs: In order, each as two texts in a list or with a space between them. Pairs with a part
            that is not among the pieces are passed over.
        file: For messages.

    Raises:
        CheckpointError: there are none, as pairs are missing or the pairs of pieces are mixed.
    """
    long = next((piece for piece in pieces if len(piece) > MAX_PIECE_CHARS), None)
    if long is not None:
        raise _no_model(file, f"a piece of {len(long):,} characters")
    known = [
        (left, right)
        for left, right in _parts(pairs, file)
        if pieces >= {left, right, left + right}
    ]
    runs = _run_scores(known)
    counts: Counter[str] = Counter()
    last = ""
    for left, right in known:
        piece = left + right
        if piece != last and piece in counts and piece not in runs:
            raise _no_model(file, f"the pairs of {piece!r:.40} apart from each other")
        counts[piece] += 1
        last = piece
    for piece in pieces:
        splits = sum(piece[:i] in pieces and piece[i:] in pieces for i in range(1, len(piece)))
        if splits != counts[piece]:
            raise _no_model(file, f"{counts[piece]} of the {splits} pairs of {piece!r:.40}")
    return {piece: -float(place) for place, piece in enumerate(counts, start=1)} | runs


def _run_scores(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the scores of the runs of white space whose pairs come first, if they are mixed.

    In Gemma's model these runs share one score, which puts their pairs in the order of the length
    of the left part, then of the right part. From the left of a text, such pairs merge to runs that
    are as long as possible. A score that grows with the length does the same. Runs of two may be
    pieces like any other, as those of tabs are.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for left, right in takewhile(_make_run, pairs):
        found.setdefault(left[0], []).append((len(left), len(right)))
    scores: dict[str, float] = {}
    for char, parts in found.items():
        lengths = {sum(part) for part in parts}
        shortest, longest = min(lengths), max(lengths)
        is_whole = shortest <= 3 and len(lengths) == longest - shortest + 1
        if not is_whole or parts != sorted(parts, reverse=True):
            return {}
        scores |= {char * length: float(length) for length in lengths}
    return scores


def _make_run(pair: Pair) -> bool:
    """Return whether the two parts make a run of one character of white space."""
    piece = "".join(pair)
    return len(set(piece)) == 1 and (piece[0] == SPACE or piece.isspace())


def _parts(pairs: Sequence[Any], file: Path) -> Iterator[Pair]:
    """Yield the two pieces of each pair, in the older form with a space between them or as a list.

    Each pair comes once.
    """
    seen = set()
    for pair in pairs:
        parts = pair.split(" ") if isinstance(pair, str) else pair
        is_pair = isinstance(parts, list) and [type(part) for part in parts] == [str, str]
        if not is_pair or tuple(parts) in seen:
            raise CheckpointError(
                f"{file}: expected merges as pairs of pieces, each once, got {reprlib.repr(pair)}"
            )
        seen.add(tuple(parts))
        yield parts[0], parts[1]


def _no_model(file: Path, found: str) -> CheckpointError:
    remedy = (
        "convert the model again with llama.cpp's converter"
        if file.suffix == ".gguf"
        else "copy tokenizer.model beside it"
    )
    return CheckpointError(
        f"{file}: expected the merges that follow from a SentencePiece model, got {found}; {remedy}"
    )
