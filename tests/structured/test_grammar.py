"""Regular languages as trees, and the regular expressions they are written out as."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.structured.grammar import (
    ANY_CHAR,
    EMPTY,
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    chars,
    except_for,
    optional,
    to_regex,
)

CODE_POINTS = st.integers(0, 0x10FFFF)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def code_points(*ranges: tuple[int, int]) -> set[int]:
    return {point for first, last in ranges for point in range(first, last + 1)}


def test_characters_are_sorted_and_joined() -> None:
    assert chars((5, 7), (1, 2), (3, 3), (6, 9)).ranges == ((1, 3), (5, 9))
    assert chars((0xD000, 0xE001)).ranges == ((0xD000, 0xD7FF), (0xE000, 0xE001))


@pytest.mark.parametrize("ranges", [(), ((5, 6), (1, 2)), ((1, 2), (3, 4)), ((0xD800, 0xD801),)])
def test_characters_that_are_not_in_order_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(AssertionError):
        Chars(ranges)


@given(st.integers(0, 300), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20))))
def test_except_for_takes_characters_away(last: int, excluded: list[tuple[int, int]]) -> None:
    some, others = (0, last), [(first, first + more) for first, more in excluded]
    left = code_points(some) - code_points(*others)
    if left and others:
        assert code_points(*except_for(chars(some), chars(*others)).ranges) == left


@given(TEXT)
def test_a_literal_stands_for_itself(text: str) -> None:
    assert re.fullmatch(to_regex(Literal(text)), text)
    assert to_regex(Literal(text)).isprintable() or not text.isprintable()


@given(st.characters(exclude_categories=["Cs"], max_codepoint=127), st.integers(0, 127))
def test_every_ascii_character_may_end_a_range(char: str, point: int) -> None:
    regex = to_regex(chars((ord(char), 127)))
    assert bool(re.fullmatch(regex, chr(point))) == (point >= ord(char))


@pytest.mark.parametrize(
    ("language", "regex"),
    [
        (EMPTY, ""),
        (Literal("a.b\n"), r"a\.b\x0a"),
        (chars((45, 45), (93, 94), (97, 122)), r"[\-\]-\^a-z]"),
        (Concat((Literal("a"), OneOf((Literal("b"), EMPTY)))), "a(?:b|)"),
        (optional(Literal("ab")), "(?:ab)?"),
        (Repeat(chars((97, 98)), 0, None), "[a-b]*"),
        (Repeat(Repeat(Literal("a"), 2, 2), 0, 1), "(?:(?:a){2})?"),
        (Repeat(OneOf((Literal("a"), Literal("b"))), 1, None), "(?:a|b)+"),
        (Repeat(Concat((Literal("a"), chars((99, 99)))), 2, None), "(?:a[c]){2,}"),
        (ANY_CHAR, "[\\x00-\ud7ff\ue000-\U0010ffff]"),
        (Repeat(Literal("a"), 3, 500), "(?:a){3,500}"),
    ],
)  # fmt: skip
def test_to_regex(language: Language, regex: str) -> None:
    assert to_regex(language) == regex


def test_an_option_ends_where_its_parentheses_do() -> None:
    either = OneOf((Literal("a"), Literal("bc")))
    regex = to_regex(Concat((either, Repeat(either, 1, 2), Literal("."))))
    assert [t for t in ("aa.", "bcabc.", "a.", "aaaa.", "aa") if re.fullmatch(regex, t)] == [
        "aa.",
        "bcabc.",
    ]


def test_a_repeat_is_in_order() -> None:
    for least, most in ((-1, 2), (3, 2)):
        with pytest.raises(AssertionError):
            Repeat(EMPTY, least, most)
