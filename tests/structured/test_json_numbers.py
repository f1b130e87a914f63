"""Numbers within bounds: each text that is within, and no other."""

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_gemma.structured.grammar import to_regex
from beam_gemma.structured.json_numbers import (
    MAX_DIGITS,
    Bound,
    decimals,
    integers,
    is_listable,
    multiples,
)

CANONICAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
LIMITS = st.none() | st.tuples(
    st.builds(
        lambda n, places: Fraction(n, 10**places),
        st.integers(-(10**17), 10**17),
        st.integers(0, 17),
    ),
    st.booleans(),
)


def bounds(limit):
    return [] if limit is None else [Bound(*limit)]


def texts_of(language):
    """Return a function that says whether a text is of a language."""
    if language is None:
        return lambda _: False
    regex = re.compile(to_regex(language))
    return lambda text: regex.fullmatch(text) is not None


def is_within(value, low, high):
    """By the definition."""
    return not (
        (low and (value < low[0] or (low[1] and value == low[0])))
        or (high and (value > high[0] or (high[1] and value == high[0])))
    )


def is_zero_with_a_sign(text):
    return text.startswith("-") and not text.strip("-0.")


@pytest.mark.parametrize("low", [None, -12, -10, -9, -1, 0, 1, 9, 10, 11])
@pytest.mark.parametrize("is_open", [False, True])
def test_integers_between_small_bounds(low: int | None, is_open: bool) -> None:
    texts = [str(n) for n in range(-130, 131)] + ["-0", "00", "01", "1.0", "", "-"]
    for high in (None, -11, -1, 0, 5, 9, 12, 99, 100, 101):
        ends = [end if end is None else (Fraction(end), is_open) for end in (low, high)]
        is_text = texts_of(integers(*map(bounds, ends)))
        for text in texts:
            is_number = CANONICAL.fullmatch(text) and "." not in text and text != "-0"
            assert is_text(text) == bool(is_number and is_within(int(text), *ends)), (text, ends)


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3))
def test_integers_between_any_bounds(one: int, other: int, step: int) -> None:
    low, high = sorted((one, other))
    is_text = texts_of(integers([Bound(Fraction(low), False)], [Bound(Fraction(high), False)]))
    for number in (low + step, high + step, (low + high) // 2 + step):
        assert is_text(str(number)) == (low <= number <= high)


def test_integers_without_bounds_have_64_bits() -> None:
    is_text = texts_of(integers([], []))
    for limit in (-(2**63), 2**63 - 1):
        for number in range(limit - 2, limit + 3):
            assert is_text(str(number)) == (-(2**63) <= number < 2**63)


def cents():
    """Return texts with up to two digits after the point, and some that are no numbers."""
    for number in range(-250, 251):
        sign, (whole, places) = "-" if number < 0 else "", divmod(abs(number), 100)
        yield f"{sign}{whole}.{places:02d}"
        if number % 10 == 0:
            yield f"{sign}{whole}.{places // 10}"
        if number % 100 == 0:
            yield f"{sign}{whole}"
    yield from ("1.", ".5", "-0", "-0.0", "-0.00", "-", "", "01", "1.005", "-.5", "1e1", "+1")


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("low", [None, "-1.1", "-1", "-0.01", "0", "0.005", "0.99", "1.1"])
def test_decimals_between_small_bounds(low: str | None, is_open: bool) -> None:
    for high in (None, "-1", "-0.95", "0", "0.07", "0.1", "1", "1.49", "1.994", "2.1"):
        ends = [end if end is None else (Fraction(end), is_open) for end in (low, high)]
        is_text = texts_of(decimals(*map(bounds, ends), max_places=2))
        for text in cents():
            is_number = CANONICAL.fullmatch(text) and not is_zero_with_a_sign(text)
            is_number = is_number and len(text.partition(".")[2]) <= 2
            assert is_text(text) == bool(is_number and is_within(Fraction(text), *ends)), (
                text,
                ends,
            )


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 10, 25, 60, 1000])
@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(-(2**63), 2**63 - 1), (-1234, 1999), (17, 123_456), (-500_000, -17), (0, 0), (1, 1)],
)
def test_multiples(step: int, lowest: int, highest: int) -> None:
    if not is_listable(step, lowest, highest):
        assert step in (3, 60)
        return
    found = multiples(step, lowest, highest)
    if found is None:
        assert -(-lowest // step) > highest // step
        return
    is_text = texts_of(found)
    near = (range(end - 1100, end + 1101) for end in (lowest, 0, highest))
    for number in itertools.chain(*near):
        is_multiple = lowest <= number <= highest and number % step == 0
        assert is_text(str(number)) == is_multiple, number
    assert not is_text("-0")
    assert not is_text("00")


def test_decimals_have_15_digits_in_all() -> None:
    is_text = texts_of(decimals([], []))
    for num_whole in range(1, MAX_DIGITS + 2):
        for places in range(MAX_DIGITS + 2):
            text = "9" * num_whole + ("." + "9" * places if places else "")
            assert is_text(text) == is_text(f"-{text}") == (num_whole + places <= MAX_DIGITS)


@settings(deadline=None)
@given(LIMITS, LIMITS, st.integers(0, MAX_DIGITS), st.data())
def test_decimals_between_any_bounds(low, high, max_places: int, data: st.DataObject) -> None:
    is_text = texts_of(decimals(bounds(low), bounds(high), max_places))
    places = data.draw(st.integers(0, MAX_DIGITS + 1))
    near = [round(limit[0] * 10**places) for limit in (low, high) if limit] or [0]
    number = data.draw(st.sampled_from(near)) + data.draw(st.integers(-2, 2))
    digits = f"{abs(number):0{places + 1}d}"
    whole = digits[: len(digits) - places]
    text = ("-" if number < 0 else "") + whole + (f".{digits[-places:]}" if places else "")
    is_number = places <= max_places and len(digits) <= MAX_DIGITS
    assert is_text(text) == (is_number and is_within(Fraction(number, 10**places), low, high))


@given(
    st.lists(
        st.tuples(st.integers(-(10**15) + 1, 10**15 - 1), st.integers(0, 14)),
        min_size=2,
        max_size=2,
    )
)
@example([(100000000000001, 14), (1, 0)])
def test_what_is_less_as_a_number_is_less_as_a_float(pairs: list[tuple[int, int]]) -> None:
    """So bounds hold for floats as for texts; with 17 digits they would not."""
    one, other = (Fraction(number, 10**places) for number, places in pairs)
    assert (one < other) == (float(one) < float(other))
