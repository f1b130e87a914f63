"""Text that keeps the origin of each of its characters while a chat template works on it.

To a template it is the plain text. Operations that move characters keep their origins; those that
write new ones, as `tojson` does, give plain text or characters of an unknown origin. Only
characters of the template itself make control pieces, so an operation that this module does not
know can never make one of a row's text.
"""

import re
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

UNKNOWN, TEMPLATE, ROW = range(3)
"""Origins of a character: not known, the template's own text, or a row's."""
LAST = 4
"""Added to the origins of the last message, which an answer may continue."""
_RUN = re.compile(rb"([\1\5]+)|[^\1\5]+")


class TracedText(str):
    """Text with the origin of each character; that of plain text is unknown."""

    __slots__ = ("_origins",)
    _origins: bytes

    def __new__(cls, text: str = "", origins: int | bytes = UNKNOWN) -> "TracedText":
        """Return a text whose characters have one origin, or one each."""
        self = super().__new__(cls, text)
        self._origins = origins if isinstance(origins, bytes) else bytes([origins]) * len(text)
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: object) -> "TracedText":
        return concatenated((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> "TracedText":
        return concatenated((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, number: SupportsIndex) -> "TracedText":
        return TracedText(super().__mul__(number), self._origins * number.__index__())

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "TracedText":
        return TracedText(super().__getitem__(key), self._origins[key])

    def __iter__(self) -> Iterator[str]:
        return map(TracedText, super().__iter__(), self._origins)

    def join(self, texts: Iterable[object], /) -> "TracedText":
        """Return texts as one, with this one between them.

        Raises:
            TypeError: one of them is no text, as a template may have it.
        """
        between: list[str] = []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected texts to join, got {type(text).__name__}")
            between += (self, text)
        return concatenated(between[1:])

    def lstrip(self, chars: str | None = None, /) -> "TracedText":
        """Return this text without white space, or certain characters, at its start."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "TracedText":
        """Return this text without white space, or certain characters, at its end."""
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None, /) -> "TracedText":
        """Return this text without white space, or certain characters, at either end."""
        return self.lstrip(chars).rstrip(chars)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Return the parts of this text between separators, by default of white space."""
        parts: list[str] = []
        position = 0
        for part in super().split(sep, maxsplit):
            start = self.find(part, position)
            position = start + len(part)
            parts.append(self[start:position])
            position += len(sep or "")
        return parts

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """Return this text with another in place of each occurrence of one."""
        if not old:
            return super().replace(old, new, count)
        return TracedText(new, origins(new)).join(self.split(old, count))


def origins(text: str) -> bytes:
    """Return the origin of each character of a text."""
    return text._origins if isinstance(text, TracedText) else bytes(len(text))


def plain(text: str) -> str:
    """Return a text without origins."""
    return str.__str__(text)


def concatenated(texts: Iterable[str]) -> TracedText:
    """Return texts as one."""
    texts = list(texts)
    return TracedText("".join(texts), b"".join(map(origins, texts)))


def runs(text: TracedText) -> Iterator[tuple[str, bool]]:
    """Yield stretches of a text as plain texts, and whether each is the template's own."""
    characters = plain(text)
    for found in _RUN.finditer(origins(text)):
        yield characters[found.start() : found.end()], found[1] is not None
