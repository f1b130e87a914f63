"""Regular expressions read as regular languages, measured by Python's own `re`."""

import json
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import ANY_CHAR, Language, to_regex
from beam_gemma.structured.regex import json_string, parse_pattern, parse_regex

CHARACTERS = "abz_019 -^]{}\n\r\x1c\u2028\ufeffé٣中😀"
TEXT = st.text(CHARACTERS, max_size=6)
PLAIN = ["a", "b", "é", "😀", "-", "]", "}", "{", r"\.", r"\-", r"\x62", r"\u0663", r"\n", r"\060"]
BRACKETS = [
    "[ab]",
    "[^ab]",
    "[a-z0]",
    "[]a]",
    "[^]^]",
    "[-a]",
    "[a-]",
    r"[\]\-é]",
    "[^\\n-a]",
    r"[\1-b]",
]
CLASSES = [".", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[\d_]", r"[^\d_]", r"[^\W1]", r"[\s.]"]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,1}?", "{,}"]


def patterns(items: list[str]) -> st.SearchStrategy[str]:
    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        options = st.lists(inner, min_size=1, max_size=3).map("|".join)
        groups = options.map("({})".format) | options.map("(?:{})".format)
        named = inner.map("(?P<name>{})".format)
        repeated = st.builds("{}{}".format, groups | st.sampled_from(items), quantifiers)
        return st.lists(groups | named | repeated, max_size=3).map("".join)

    quantifiers = st.sampled_from(QUANTIFIERS)
    leaves = st.lists(st.sampled_from(items), max_size=3).map("".join)
    whole = st.lists(st.recursive(leaves, grow, max_leaves=6), min_size=1, max_size=2)
    return whole.map("|".join).filter(is_valid)


def is_valid(pattern: str) -> bool:
    """A group's name may be there once."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@lru_cache
def compiled(language: Language) -> re.Pattern[str]:
    return re.compile(to_regex(language))


def holds(language: Language, text: str) -> bool:
    return bool(compiled(language).fullmatch(text))


@settings(deadline=None)
@given(patterns(PLAIN + BRACKETS + CLASSES), st.lists(TEXT, max_size=20))
def test_it_means_what_python_means(pattern: str, texts: list[str]) -> None:
    language = parse_regex(pattern)
    for text in texts:
        assert holds(language, text) == bool(re.fullmatch(pattern, text))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*"()[]{}^$|*+?.\\ab-1,dwSPx<>:=!#\n", *PLAIN]), max_size=7))
def test_anything_is_refused_or_means_what_python_means(pieces: list[str]) -> None:
    pattern = "".join(pieces)
    try:
        language = parse_regex(pattern)
    except OptionsError:
        return
    for text in ("", "a", "b", "ab", "aa", "1", "d", "-", "\n", *"()[]{}^$|\\"):
        assert holds(language, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("item", PLAIN + BRACKETS + CLASSES)
def test_every_item_is_read_as_python_does(item: str) -> None:
    texts = [*CHARACTERS, *("a" + char + "b" for char in CHARACTERS), *(2 * c for c in CHARACTERS)]
    for pattern in (item, f"a{item}b", *(item + quantifier for quantifier in QUANTIFIERS)):
        language = parse_regex(pattern)
        for text in ("", *texts):
            assert holds(language, text) == bool(re.fullmatch(pattern, text))


@settings(deadline=None)
@given(patterns(PLAIN + BRACKETS), TEXT, st.sampled_from(["", "^"]), st.sampled_from(["", r"\Z"]))
def test_a_pattern_of_json_schema_may_match_anywhere(
    pattern: str, text: str, start: str, end: str
) -> None:
    pattern = start + pattern + end
    assert holds(parse_pattern(pattern, "x"), text) == bool(re.search(pattern, text))


@settings(deadline=None)
@given(patterns(CLASSES), TEXT)
def test_a_pattern_of_json_schema_holds_for_ascii_and_for_unicode(pattern: str, text: str) -> None:
    """ECMAScript's digits and letters are ASCII's, Python's are Unicode's."""
    if holds(parse_pattern(f"^(?:{pattern})$", "x"), text):
        assert re.fullmatch(pattern, text)
        assert re.fullmatch(pattern, text, re.ASCII)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (r"^\d$", "09", "٣a"),
        (r"^\D$", "a ", "0٣"),
        (r"^[^\D]$", "09", "٣a"),
        (r"^\w$", "aZ_0", "é٣ "),
        (r"^\W$", " -😀", "aé٣"),
        (r"^\s$", " \t\n\u2028", "\x1c\x85\ufeffa"),
        (r"^\S$", "aé", " \x1c\ufeff"),
        (r"^.$", "aé\x1c", "\n\r\u2028\u2029"),
        (r"^[.]$", ".", "a"),
    ],
)
def test_what_python_and_ecmascript_differ_in_is_left_out(
    pattern: str, inside: str, outside: str
) -> None:
    language = parse_pattern(pattern, "x")
    assert [char for char in inside + outside if holds(language, char)] == list(inside)


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("^a|b$", ["a", "ax", "b", "xb"]),
        ("^a$|^b$", ["a", "b"]),
        ("^(a|b)$", ["a", "b"]),
        (r"\Aa\Z", ["a"]),
        ("a", ["a", "ax", "xa", "\na\n"]),
        ("", ["", "a", "\n"]),
    ],
)
def test_anchors_bind_an_option(pattern: str, texts: list[str]) -> None:
    every = ["", "a", "b", "ax", "xa", "bx", "xb", "\na\n", "\n"]
    language = parse_pattern(pattern, "x")
    expected = [text for text in every if re.search(pattern, text)]
    assert [text for text in every if holds(language, text)] == expected
    assert set(texts) <= set(expected)


def test_anchors_make_no_difference_to_a_whole() -> None:
    for pattern in ("^ab$", r"\Aab\Z", "^ab", "ab$"):
        assert parse_regex(pattern) == parse_regex("ab")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(?=b)", r"expected no lookahead, got \(\?= at character 1; rewrite it"),
        ("a(?!b)", r"expected no lookahead, got \(\?! at character 1"),
        ("(?<=a)b", r"expected no lookbehind, got \(\?< at character 0"),
        ("(?>a)", r"expected no atomic group, got \(\?> at character 0"),
        ("(a)(?(1)b|c)", r"expected no condition, got \(\?\( at character 3"),
        ("a(?#b)", r"expected no comment, got \(\?# at character 1"),
        (r"(a)\1", r"expected no reference to a group, got \\1 at character 3"),
        ("(?P<n>a)(?P=n)", r"expected no reference to a group, got \(\?P= at character 8"),
        ("(?i)a", r"expected no flag, got \(\? at character 0"),
        ("(?i:a)", r"expected no flag, got \(\? at character 0"),
        (r"a\b", r"expected no word boundary, got \\b at character 1"),
        ("a^b", r"expected no anchor but at the ends, got \^ at character 1"),
        ("a$b", r"expected no anchor but at the ends, got \$ at character 1"),
        ("(a$)", r"expected no anchor but at the ends, got \$ at character 2"),
        (r"a\Ab", r"expected no anchor but at the ends, got \\A at character 1"),
        ("a++", r"expected no possessive repetition, got \+ at character 2"),
        ("(" * 101 + ")" * 101, "expected at most 100 groups within each other, got more"),
        ("a(", r"expected a regular expression, got missing \), .* at character 1"),
        ("a{3,2}", "expected a regular expression, got min repeat .* at character 2"),
        ("a{9999999999}", "expected a smaller regular expression, got the repetition number"),
        (r"a[\ud800]", r"expected a character that text may hold, got \[\\ud800\] at character 1"),
        (r"[^\w\W]", "expected a character that text may hold"),
    ],
)
def test_what_is_not_regular_is_refused_with_its_place(pattern: str, message: str) -> None:
    with pytest.raises(OptionsError, match=f"^regex: {message}"):
        parse_regex(pattern)
    with pytest.raises(OptionsError, match=f"^#/pattern: {message}"):
        parse_pattern(pattern, "#/pattern")


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(ANY_TEXT)
def test_json_strings_are_what_json_writes(text: str) -> None:
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    assert holds(json_string(parse_regex(re.escape(text))), written)
    assert holds(json_string(parse_regex(r"(?:.|\n)*")), written)


@given(ANY_TEXT)
def test_json_strings_read_as_their_texts(text: str) -> None:
    """Of one character each: nothing that JSON would not read, and no second way to write one."""
    language = json_string(parse_regex(r"[\0-\x1f\"\\x-z]"))
    if holds(language, text):
        assert re.fullmatch(r"[\0-\x1f\"\\x-z]", json.loads(f'"{text}"'))


def test_every_character_has_one_way_in_json() -> None:
    language = json_string(ANY_CHAR)
    for point in [*range(0x100), 0x2028, 0x1F600]:
        assert holds(language, json.dumps(chr(point), ensure_ascii=False)[1:-1])
    for text in ('"', "\\", "\n", r"\/", r"\u0041", r"\u000a", r"\x00", "ab"):
        assert not holds(language, text)
