"""Text with origins is the text itself to all that looks at it, and no character changes sides."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.inputs.traced_text import ROW, TEMPLATE, TracedText, concatenated, origins, runs

# Letters of a template are small, those of rows are not.
ORIGINS = {"a": TEMPLATE, "b": TEMPLATE, " ": TEMPLATE, "A": ROW, "B": ROW, "\u2003": ROW}
TEXT = st.text(alphabet="".join(ORIGINS), max_size=12)
OPERATIONS: dict[str, Callable[[str, str], object]] = {
    "+": lambda text, other: text + other,
    "*": lambda text, other: 3 * text * len(other),
    "index": lambda text, other: text and text[len(other) % len(text)],
    "slice": lambda text, other: text[len(other) : -1],
    "backwards": lambda text, _: text[::-2],
    "items": lambda text, _: list(text),
    "join": lambda text, other: text.join([other, text, other]),
    "join nothing": lambda text, _: text.join([]),
    "strip": lambda text, _: [text.strip(), text.lstrip(), text.rstrip()],
    "strip letters": lambda text, other: [text.strip(other), text.rstrip(other)],
    "split": lambda text, other: [text.split(other or " "), text.split(other or " ", 1)],
    "split at space": lambda text, _: [text.split(), text.split(None, 1)],
    "replace": lambda text, other: text.replace("a", other, 2).replace("A", other),
    "str": lambda text, _: str(text),
}


def traced(text: str) -> TracedText:
    return TracedText(text, bytes(ORIGINS[char] for char in text))


def texts_of(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [t for item in value for t in texts_of(item)]


@pytest.mark.parametrize("name", OPERATIONS)
@given(TEXT, TEXT)
def test_operations_give_the_same_text_with_the_origin_of_every_character(name, text, other):
    expected = OPERATIONS[name](text, other)
    result = OPERATIONS[name](traced(text), traced(other))
    assert result == expected
    for part in texts_of(result):
        assert origins(part) == bytes(ORIGINS[char] for char in part)


def test_a_separator_that_overlaps_itself_is_passed_over_as_a_whole():
    before, after = TracedText("xxx", bytes([TEMPLATE, TEMPLATE, ROW])).split("xx")
    assert (before, after, origins(after)) == ("", "x", bytes([ROW]))


def test_texts_without_origins_are_of_an_unknown_one_in_company_too():
    joined = concatenated(["x", TracedText("ab", TEMPLATE), "y" + TracedText("A", ROW)])
    assert (joined, origins(joined)) == ("xabyA", bytes([0, TEMPLATE, TEMPLATE, 0, ROW]))
    assert list(runs(joined)) == [("x", False), ("ab", True), ("yA", False)]


@pytest.mark.parametrize("write", [str.upper, str.title, str.casefold, repr])
def test_operations_that_write_new_text_lose_the_origins(write):
    assert set(origins(write(TracedText("<bos>", TEMPLATE)))) == {0}


def test_what_is_no_text_cannot_be_joined():
    for others in (["a", 1], [["a"], "b"]):
        with pytest.raises(TypeError):
            TracedText(", ").join(others)
