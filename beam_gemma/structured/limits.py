"""Limits of languages: what would take too long to compile or to follow is refused before it."""

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import (
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    each_once,
    parts_of,
)

MAX_SIZE = 500_000
"""Maximum characters and parts of a language, each part counted once: 30,000 choices, for one."""
MAX_NESTING = 500
"""Maximum parts within each other; llguidance calls itself for each of them."""
MAX_BRIEF_LENGTH = 20_000
"""Maximum characters of a brief text; each of them is measured."""
MANY = 10**12
"""Numbers of this size are not written out; they may have thousands of digits."""


def check_limits(language: Language) -> None:
    """Refuse a language that is too large; this takes as long as its size, not that of its texts.

    Raises:
        OptionsError: the language exceeds one of the limits above.
    """
    lengths: dict[int, int] = {}
    levels: dict[int, int] = {}
    size = 0
    for part in each_once(language):
        inner = parts_of(part)
        size += 1 + _own_size(part)
        levels[id(part)] = 1 + max((levels[id(each)] for each in inner), default=0)
        lengths[id(part)] = _brief_length(part, [lengths[id(each)] for each in inner])
    for limit, got, what, remedy in (
        (MAX_SIZE, size, "characters and parts", "allow fewer choices, constants or properties"),
        (MAX_NESTING, levels[id(language)], "parts within each other", "take fewer levels"),
        (
            MAX_BRIEF_LENGTH,
            lengths[id(language)],
            "characters of a text that repeats nothing without need",
            "lower minLength, minItems, or the counts of the regex",
        ),
    ):
        if got > limit:
            many = f"{got:,}" if got < MANY else "more"
            raise OptionsError(
                f"constraint: expected at most {limit:,} {what}, got {many}; {remedy}"
            )


def _own_size(part: Language) -> int:
    match part:
        case Literal(text):
            return len(text)
        case Chars(ranges):
            return len(ranges)
        case _:
            return len(parts_of(part))


def _brief_length(part: Language, inner: list[int]) -> int:
    """Return the length of a longest text that repeats nothing more often than required.

    What is optional may be in such a text.
    """
    match part:
        case Literal(text):
            return len(text)
        case Concat():
            return sum(inner)
        case OneOf():
            return max(inner)
        case Repeat(_, least, most):
            return inner[0] if (least, most) == (0, 1) else least * inner[0]
        case _:
            return 1
