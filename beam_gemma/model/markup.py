"""Prompt parts: text from rows, kept apart from control pieces of templates."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is encoded literally and never yields a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """One control piece, such as `<end_of_turn>`."""

    piece: str


@dataclass(frozen=True, slots=True)
class SoftTokens(Control):
    """The tokens of a picture, which a tower computes; `piece` is what people read instead."""

    token_id: int
    """Token id that stands for each of them."""
    num_tokens: int


Part = Text | Control


class ControlPieces:
    """Finds a vocabulary's control pieces in markup, from the left, longest match first."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = frozenset(pieces)
        # A vocabulary has thousands of pieces with few lengths and few first characters, so trying
        # each length at a first character is far faster than one alternation of all pieces.
        self._lengths = sorted({len(piece) for piece in self._pieces}, reverse=True)
        firsts = sorted({piece[0] for piece in self._pieces})
        self._first = re.compile(f"[{re.escape(''.join(firsts))}]" if firsts else r"(?!)")

    def split(self, markup: str) -> tuple[Part, ...]:
        """Split trusted markup into text and control pieces."""
        return tuple(self._parts(markup))

    def _parts(self, markup: str) -> Iterator[Part]:
        start = position = 0
        while match := self._first.search(markup, position):
            piece = self._piece_at(markup, match.start())
            if piece is None:
                position = match.end()
                continue
            if start < match.start():
                yield Text(markup[start : match.start()])
            yield Control(piece)
            start = position = match.start() + len(piece)
        if start < len(markup):
            yield Text(markup[start:])

    def _piece_at(self, markup: str, start: int) -> str | None:
        candidates = (markup[start : start + length] for length in self._lengths)
        return next((piece for piece in candidates if piece in self._pieces), None)
