"""Regular languages: sets of texts, as small trees.

Such a tree defines the valid texts of a constrained row. It is used twice: as a regular expression
for llguidance, which masks tokens, and as an automaton, which finds the way to the end.

Every language contains at least one text; `Literal("")` contains only the empty one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)

Range = tuple[int, int]
"""First and last of consecutive code points."""


@dataclass(frozen=True, slots=True)
class Literal:
    """One text."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """Texts of a single character from a set; `chars` builds one from any ranges."""

    ranges: tuple[Range, ...]
    """Code points: sorted ranges that neither overlap nor touch, without surrogates."""

    def __post_init__(self) -> None:
        assert self.ranges, "no character"
        assert self.ranges == _normal(self.ranges), self.ranges


@dataclass(frozen=True, slots=True)
class Concat:
    """Concatenations of one text of each part."""

    parts: tuple["Language", ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """Texts of any option."""

    options: tuple["Language", ...]

    def __post_init__(self) -> None:
        assert self.options, "no option"


@dataclass(frozen=True, slots=True)
class Repeat:
    """Concatenations of `min` to `max` texts of the body."""

    body: "Language"
    min: int
    max: int | None
    """None means no limit."""

    def __post_init__(self) -> None:
        assert self.min >= 0, self.min
        assert self.max is None or self.min <= self.max, (self.min, self.max)


Language = Literal | Chars | Concat | OneOf | Repeat

EMPTY = Literal("")


def optional(language: Language) -> Repeat:
    """Return a language together with the empty text."""
    return Repeat(language, 0, 1)


def chars(*ranges: Range) -> Chars:
    """Return the characters of some ranges, which may overlap; surrogates are left out."""
    return Chars(_normal(ranges))


def except_for(some: Chars, excluded: Chars) -> Chars:
    """Return the characters of `some` that `excluded` lacks; at least one must remain."""
    return chars(*without(some.ranges, excluded.ranges))


def _normal(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return sorted ranges, with those that touch joined and surrogates removed."""
    joined: list[Range] = []
    for first, last in sorted(without(ranges, [SURROGATES])):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def without(ranges: Iterable[Range], excluded: Iterable[Range]) -> list[Range]:
    """Return the parts of `ranges` that no excluded range covers."""
    left = []
    holes = sorted(excluded)
    for first, last in ranges:
        start = first
        for low, high in holes:
            if start < low <= last:
                left.append((start, low - 1))
            if low <= last:
                start = max(start, high + 1)
        if start <= last:
            left.append((start, last))
    return left


ANY_CHAR = chars((0, MAX_CODE_POINT))


def to_regex(language: Language) -> str:
    """Return a regular expression whose full matches are the texts of a language.

    Rust's regex crate, which `llguidance` uses, and Python's `re` read it alike.
    """
    match language:
        case Literal(text):
            return "".join(map(_escaped, text))
        case Chars(ranges):
            return f"[{''.join(map(_class_range, ranges))}]"
        case Concat(parts):
            return "".join(map(to_regex, parts))
        case OneOf(options):
            return f"(?:{'|'.join(map(to_regex, options))})"
        case Repeat(body):
            return _atom(body) + _quantifier(language)


def _atom(language: Language) -> str:
    """Return a regular expression that a quantifier may follow."""
    regex = to_regex(language)
    return regex if isinstance(language, Chars | OneOf) else f"(?:{regex})"


def _quantifier(repeat: Repeat) -> str:
    match repeat.min, repeat.max:
        case 0, 1:
            return "?"
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case least, None:
            return f"{{{least},}}"
        case least, most:
            return f"{{{least}}}" if least == most else f"{{{least},{most}}}"


def _class_range(ends: Range) -> str:
    first, last = (_escaped(chr(end)) for end in ends)
    return first if first == last else f"{first}-{last}"


def _escaped(char: str) -> str:
    """Return a character escaped so that it is literal, inside and outside brackets."""
    if char < " " or char == "\x7f":
        return f"\\x{ord(char):02x}"
    return f"\\{char}" if char in r"\.+*?()|[]{}^$-&~#" else char
