r"""Parse regular expressions, in the syntax and with the meaning of Python's `re`, as languages.

`re` checks the syntax. The parser reads the parts that form a regular language: characters,
classes, groups, options and repetitions; lazy ones match the same texts as greedy ones. `^` and `$`
may stand at the ends. All else is refused with its position.

`\d`, `\w` and `\s` match Unicode characters, as in Python. The regular expressions of JSON Schema
are ECMAScript's, but Python's validators read them as Python's: the language contains only texts
that match in both.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import (
    ANY_CHAR,
    EMPTY,
    MAX_CODE_POINT,
    SURROGATES,
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Range,
    Repeat,
    chars,
    one_of,
    rebuilt,
    repeated,
    without,
)

MAX_LENGTH = 10_000
"""Maximum characters of a regular expression."""
MAX_DEPTH = 100
ANY_TEXT = Repeat(ANY_CHAR, 0, None)
QUANTIFIER = re.compile(r"([*+?])|\{(?!\})([0-9]*)(,?)([0-9]*)\}")
END = re.compile(r"(?:\$|\\Z)(?=\||\Z)")
GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
CODE = r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|N\{[^}]*\}|[afnrtv]"
ESCAPE = re.compile(rf"\\(?:{CODE}|0[0-7]{{0,2}}|[1-7][0-7]{{2}})")
ESCAPE_IN_BRACKETS = re.compile(rf"\\(?:{CODE}|b|[0-7]{{1,3}})")
REFUSED = {
    r"\(\?[=!]": "lookahead",
    r"\(\?<": "lookbehind",
    r"\(\?>": "atomic group",
    r"\(\?\(": "condition",
    r"\(\?#": "comment",
    r"\(\?P=|\\[1-9]": "reference to a group",
    r"\(\?": "flag",
    r"\\[bB]": "word boundary",
    r"[\^$]|\\[AZ]": "anchor but at the ends",
}
"""Names of refused constructs by patterns of their beginning; the first match applies."""


class Class(NamedTuple):
    """A class of characters, which may differ between two dialects."""

    ranges: tuple[Range, ...]
    """Characters of the class in both dialects."""
    possible: tuple[Range, ...]
    """Characters of the class in at least one dialect."""

    def __invert__(self) -> "Class":
        ranges, possible = (tuple(without(ANY_CHAR.ranges, some)) for some in reversed(self))
        return Class(ranges, possible)


class Option(NamedTuple):
    """A top-level option of a regular expression."""

    language: Language
    is_start: bool
    """True if the option matches only at the start of a text."""
    is_end: bool


def parse_regex(pattern: str) -> Language:
    """Return the language of the texts that match as a whole.

    Raises:
        OptionsError: it is no regular expression, or has no regular language.
    """
    options = Parser(pattern, python_classes(), "regex").options()
    return one_of(option.language for option in options)


def parse_pattern(pattern: str, place: str) -> Language:
    """Return the language of the texts that contain a match, as JSON Schema's `pattern` does.

    Args:
        pattern: The regular expression.
        place: The place of the pattern, for error messages.

    Raises:
        OptionsError: it is no regular expression, or has no regular language.
    """
    return one_of(
        _concat((EMPTY if is_start else ANY_TEXT, language, EMPTY if is_end else ANY_TEXT))
        for language, is_start, is_end in Parser(pattern, portable_classes(), place).options()
    )


class Parser:
    """Reads a regular expression from its start to its end."""

    def __init__(self, pattern: str, classes: Mapping[str, Class], place: str) -> None:
        """Check the syntax of a regular expression.

        Args:
            pattern: The regular expression.
            classes: The character classes by their notation in a pattern.
            place: The place of the pattern, for error messages.
        """
        self._pattern = pattern
        self._classes = classes
        self._place = place
        self._at = 0
        self._depth = 0
        self._known: dict[str, Language] = {}
        if len(pattern) > MAX_LENGTH:
            got = f"{len(pattern):,}"
            raise self._error(f"at most {MAX_LENGTH:,} characters", got, MAX_LENGTH)
        try:
            with warnings.catch_warnings():
                # These warn of syntax whose meaning may change in later versions of Python.
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(pattern)
        except re.error as error:
            raise self._error("a regular expression", error.msg, error.pos) from error
        except (OverflowError, RecursionError) as error:
            raise self._error("a smaller regular expression", str(error), 0) from error

    def options(self) -> list[Option]:
        """Return the top-level options."""
        options = [self._option()]
        while self._take("|"):
            options.append(self._option())
        self._check()
        return options

    def _option(self) -> Option:
        is_start = self._take("^", r"\A")
        language = self._sequence()
        return Option(language, is_start, is_end=self._match(END) is not None)

    def _sequence(self) -> Language:
        parts = []
        while self._at < len(self._pattern) and not self._sees("|", ")", "$", r"\Z"):
            parts.append(self._repeated(self._item()))
        return _concat(parts)

    def _item(self) -> Language:
        start = self._at
        if self._match(GROUP):
            return self._group()
        if self._take("["):
            return self._characters(self._brackets(), start)
        if (some := self._class()) is not None:
            return self._characters(some, start)
        if ESCAPE.match(self._pattern, start) is None:
            self._check()
        return self._characters(_only(self._code_point(ESCAPE)), start)

    def _group(self) -> Language:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"at most {MAX_DEPTH} groups within each other", "more", self._at)
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        if not self._take(")"):
            self._check()
        self._depth -= 1
        return one_of(options)

    def _repeated(self, body: Language) -> Language:
        found = self._match(QUANTIFIER)
        if found is None:
            return body
        if self._sees("+"):
            raise self._error("no possessive repetition", "+", self._at)
        self._take("?")
        sign, least, comma, most = found.groups()
        if sign:
            return repeated(body, int(sign == "+"), 1 if sign == "?" else None)
        if not comma:
            return repeated(body, int(least), int(least))
        return repeated(body, int(least or 0), int(most) if most else None)

    def _brackets(self) -> Class:
        is_negated = self._take("^")
        found: dict[str, Class] = {}
        while not found or not self._take("]"):
            start = self._at
            some = self._in_brackets()
            found[self._pattern[start : self._at]] = some
        ranges, possible = (tuple(chain(*each)) for each in zip(*found.values(), strict=True))
        return ~Class(ranges, possible) if is_negated else Class(ranges, possible)

    def _in_brackets(self) -> Class:
        if self._pattern[self._at] != "." and (some := self._class()) is not None:
            return some
        first = last = self._code_point(ESCAPE_IN_BRACKETS)
        if self._sees("-") and not self._sees("-]"):
            self._take("-")
            last = self._code_point(ESCAPE_IN_BRACKETS)
        return _only(first, last)

    def _class(self) -> Class | None:
        """Consume a notation for a class of characters, if one comes next."""
        for written, some in self._classes.items():
            if self._take(written):
                return some
        return None

    def _code_point(self, escape: re.Pattern[str]) -> int:
        """Consume the notation of one character and return its code point."""
        if found := self._match(escape):
            return ord(found[0].encode().decode("unicode_escape"))
        self._take("\\")
        self._at += 1
        return ord(self._pattern[self._at - 1])

    def _characters(self, some: Class, start: int) -> Language:
        """Return the language of a class, the same object for the same notation."""
        notation = self._pattern[start : self._at]
        if notation not in self._known:
            if (found := _literal_or_chars(some.ranges)) is None:
                raise self._error("a character that text may hold", notation, start)
            self._known[notation] = found
        return self._known[notation]

    def _take(self, *texts: str) -> bool:
        """Consume one of some texts, if it comes next; return whether one did."""
        for text in texts:
            if self._sees(text):
                self._at += len(text)
                return True
        return False

    def _sees(self, *texts: str) -> bool:
        return any(self._pattern.startswith(text, self._at) for text in texts)

    def _match(self, what: re.Pattern[str]) -> re.Match[str] | None:
        found = what.match(self._pattern, self._at)
        self._at = found.end() if found else self._at
        return found

    def _check(self) -> None:
        """Refuse the next construct, if it is among `REFUSED`."""
        for begins, name in REFUSED.items():
            if found := re.compile(begins).match(self._pattern, self._at):
                raise self._error(f"no {name}", found[0], self._at)

    def _error(self, expected: str, got: str, at: int | None) -> OptionsError:
        return OptionsError(
            f"{self._place}: expected {expected}, got {got} at character {at or 0}; rewrite it"
        )


def json_string(language: Language) -> Language:
    """Return a language with its texts escaped as in JSON strings, without the quotes."""
    return rebuilt(language, _leaf_in_json)


def _leaf_in_json(leaf: Literal | Chars) -> Language:
    if isinstance(leaf, Literal):
        return Literal(_in_json(leaf.text))
    return _chars_in_json(leaf.ranges)


ESCAPED = [*map(chr, range(0x20)), '"', "\\"]


def _chars_in_json(ranges: Sequence[Range]) -> Language:
    points = [ord(char) for char in ESCAPED]
    plain = without(ranges, [(point, point) for point in points])
    written = [_in_json(chr(point)) for point in points if any(a <= point <= b for a, b in ranges)]
    names = [ord(text[1]) for text in written if len(text) == 2]
    codes = [Literal(text[2:]) for text in written if len(text) > 2]
    options: list[Language] = [chars(*plain)] if plain else []
    if names:
        options.append(Concat((Literal("\\"), chars(*((name, name) for name in names)))))
    if codes:
        options.append(Concat((Literal("\\u"), OneOf(tuple(codes)))))
    return one_of(options)


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _concat(languages: Iterable[Language]) -> Language:
    """Concatenate languages; adjacent literals are merged."""
    parts: list[Language] = []
    for language in languages:
        if isinstance(language, Literal) and parts and isinstance(parts[-1], Literal):
            parts[-1] = Literal(parts[-1].text + language.text)
        elif language != EMPTY:
            parts.append(language)
    if not parts:
        return EMPTY
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def _literal_or_chars(ranges: Iterable[Range]) -> Language | None:
    """Return the characters of some ranges that text may hold; None if there are none."""
    left = without(ranges, [SURROGATES])
    if not left:
        return None
    found = chars(*left)
    ((first, last), *others) = found.ranges
    return found if others or first < last else Literal(chr(first))


def _only(first: int, last: int | None = None) -> Class:
    ranges = ((first, first if last is None else last),)
    return Class(ranges, ranges)


@cache
def python_classes() -> dict[str, Class]:
    """Return the character classes of Python by their notation."""
    classes = {rf"\{letter}": Class(*[_unicode(letter)] * 2) for letter in "dws"}
    return _with_opposites(classes, line_ends=Class(*[((10, 10),)] * 2))


@cache
def portable_classes() -> dict[str, Class]:
    """Return the character classes of Python and ECMAScript by their notation."""
    digit, word, space = (_unicode(letter) for letter in "dws")
    ascii_digit, letters = (48, 57), ((65, 90), (95, 95), (97, 122))
    byte_order_mark, separators = (0xFEFF, 0xFEFF), [(0x1C, 0x1F), (0x85, 0x85)]
    classes = {
        r"\d": Class((ascii_digit,), digit),
        r"\w": Class((ascii_digit, *letters), word),
        r"\s": Class(tuple(without(space, separators)), (*space, byte_order_mark)),
    }
    line_feed = (10, 10)
    return _with_opposites(
        classes, line_ends=Class((line_feed,), (line_feed, (13, 13), (0x2028, 0x2029)))
    )


def _with_opposites(classes: Mapping[str, Class], line_ends: Class) -> dict[str, Class]:
    opposites = {written.upper(): ~some for written, some in classes.items()}
    return {**classes, **opposites, ".": ~line_ends}


def _unicode(letter: str) -> tuple[Range, ...]:
    everything = "".join(map(chr, range(MAX_CODE_POINT + 1)))
    found = re.finditer(rf"\{letter}+", everything)
    return tuple((match.start(), match.end() - 1) for match in found)
