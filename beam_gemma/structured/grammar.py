"""Regular languages: sets of texts, as small trees.

Such a tree defines the valid texts of a constrained row. It is used twice: as a grammar for
llguidance, which masks tokens, and as an automaton, which finds the way to the end.

A part that a tree contains several times is one object. Written out, such a tree may be
exponentially larger than it is, so functions of trees look at each object once, by `each_once`, and
none of them calls itself.

Every language contains at least one text; `Literal("")` contains only the empty one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_CODE_POINT = 0x10FFFF
MAX_COUNT = 2**31 - 1
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


def repeated(body: Language, least: int, most: int | None) -> Language:
    """Return `Repeat`, or fewer repetitions within each other if those have the same texts.

    The texts of (x{i,j}){m,n} are those of x{im,jn} if the counts of x that k of them give are
    followed by those of k + 1, from k = m on: if i(k + 1) is at most jk + 1.
    """
    if not isinstance(body, Repeat) or body.max == 0 or most == 0:
        return body if least == most == 1 else Repeat(body, least, most)
    reach = float("inf") if body.max is None and least else (body.max or 0) * least
    if least != most and body.min * (least + 1) > reach + 1:
        return Repeat(body, least, most)
    top = None if body.max is None or most is None else body.max * most
    return Repeat(body.body, body.min * least, top)


def one_of(languages: Iterable[Language]) -> Language:
    """Return the texts of any of some languages, of which there is at least one."""
    options = tuple(languages)
    return options[0] if len(options) == 1 else OneOf(options)


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


def parts_of(language: Language) -> tuple[Language, ...]:
    """Return the languages that a language is made of; none for a literal or characters."""
    match language:
        case Concat(parts):
            return parts
        case OneOf(options):
            return options
        case Repeat(body):
            return (body,)
        case _:
            return ()


def each_once(language: Language) -> list[Language]:
    """Return all parts of a language, each object once and after its own parts; itself last."""
    found: dict[int, Language] = {}
    waiting = [(language, False)]
    while waiting:
        part, is_expanded = waiting.pop()
        if is_expanded:
            found[id(part)] = part
        elif id(part) not in found:
            waiting.append((part, True))
            waiting += [(inner, False) for inner in parts_of(part) if id(inner) not in found]
    return list(found.values())


def rebuilt(language: Language, of_leaf: Callable[[Literal | Chars], Language]) -> Language:
    """Return a language with another one in place of each literal and each set of characters."""
    made: dict[int, Language] = {}
    for part in each_once(language):
        inner = tuple(made[id(each)] for each in parts_of(part))
        match part:
            case Concat():
                made[id(part)] = Concat(inner)
            case OneOf():
                made[id(part)] = OneOf(inner)
            case Repeat(_, least, most):
                made[id(part)] = Repeat(inner[0], least, most)
            case _:
                made[id(part)] = of_leaf(part)
    return made[id(language)]


def is_same(one: Language, other: Language) -> bool:
    """Return whether two trees are equal; unlike `==`, this compares each two parts once."""
    seen: set[tuple[int, int]] = set()
    waiting = [(one, other)]
    while waiting:
        left, right = waiting.pop()
        pair = (id(left), id(right))
        if left is right or pair in seen:
            continue
        seen.add(pair)
        inner = parts_of(left), parts_of(right)
        if not inner[0]:
            if left != right:
                return False
        elif not _is_alike(left, right) or len(inner[0]) != len(inner[1]):
            return False
        waiting += zip(*inner, strict=True)
    return True


def _is_alike(one: Language, other: Language) -> bool:
    """Return whether two languages are equal but for their parts."""
    if isinstance(one, Repeat) and isinstance(other, Repeat):
        return (one.min, one.max) == (other.min, other.max)
    return type(one) is type(other)


def to_regex(language: Language) -> str:
    """Return a regular expression whose full matches are the texts of a language.

    Rust's regex crate, which `llguidance` uses, and Python's `re` read it alike.
    """
    written: dict[int, str] = {}
    for part in each_once(language):
        inner = [written[id(each)] for each in parts_of(part)]
        written[id(part)] = regex_of(part, inner)
    return written[id(language)]


def regex_of(language: Language, parts: Sequence[str]) -> str:
    """Return the regular expression of a language.

    Args:
        language: The language.
        parts: The regular expressions of its parts.
    """
    match language:
        case Literal(text):
            return "".join(map(_escaped, text))
        case Chars(ranges):
            return f"[{''.join(map(_class_range, ranges))}]"
        case Concat():
            return "".join(parts)
        case OneOf():
            return f"(?:{'|'.join(parts)})"
        case Repeat(body):
            atom = parts[0] if isinstance(body, Chars | OneOf) else f"(?:{parts[0]})"
            return atom + quantifier(language)


def quantifier(repeat: Repeat) -> str:
    """Return the counts of a repetition, as they are written behind its body."""
    # llguidance reads no larger count, and no text repeats anything as often.
    limit = None if repeat.max is not None and repeat.max > MAX_COUNT else repeat.max
    match repeat.min, limit:
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
