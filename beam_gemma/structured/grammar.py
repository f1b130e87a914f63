"""Regular languages: sets of texts, as small trees.

What a constrained row may say is such a tree. It is written out once as a regular expression, for
the library that masks tokens, and read once as an automaton, which knows the way to the end.

Every language holds at least one text; `Literal("")` holds the empty one alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)

Range = tuple[int, int]
"""The first and the last of some neighbouring code points."""


@dataclass(frozen=True, slots=True)
class Literal:
    """One text."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """The texts of one character, of some; `chars` makes one of any ranges."""

    ranges: tuple[Range, ...]
    """Sorted, apart from each other, without surrogates."""

    def __post_init__(self) -> None:
        assert self.ranges, "no character"
        assert self.ranges == _normal(self.ranges), self.ranges


@dataclass(frozen=True, slots=True)
class Concat:
    """A text of each part, one behind the other."""

    parts: tuple["Language", ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """The texts of all options."""

    options: tuple["Language", ...]

    def __post_init__(self) -> None:
        assert self.options, "no option"


@dataclass(frozen=True, slots=True)
class Repeat:
    """So many texts of the body, one behind the other."""

    body: "Language"
    min: int
    max: int | None
    """None is any number."""

    def __post_init__(self) -> None:
        assert self.min >= 0, self.min
        assert self.max is None or self.min <= self.max, (self.min, self.max)


Language = Literal | Chars | Concat | OneOf | Repeat

EMPTY = Literal("")


def optional(language: Language) -> Repeat:
    """Return the texts of a language, and the empty one."""
    return Repeat(language, 0, 1)


def chars(*ranges: Range) -> Chars:
    """Return the characters of some ranges, which may overlap; surrogates are left out."""
    return Chars(_normal(ranges))


def except_for(some: Chars, excluded: Chars) -> Chars:
    """Return the characters of the first that the second lacks; there must be one."""
    return chars(*without(some.ranges, excluded.ranges))


def _normal(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sort ranges, join those that touch, and cut surrogates out."""
    joined: list[Range] = []
    for first, last in sorted(without(ranges, [SURROGATES])):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def without(ranges: Iterable[Range], excluded: Iterable[Range]) -> list[Range]:
    """Return what some ranges hold that others lack."""
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
    """Return a regular expression that matches, as a whole, the texts of a language.

    It means the same to Rust's regex crate, which `llguidance` uses, and to Python's `re`.
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
    """Write a character so that it stands for itself, within brackets and without."""
    if char < " " or char == "\x7f":
        return f"\\x{ord(char):02x}"
    return f"\\{char}" if char in r"\.+*?()|[]{}^$-&~#" else char
