"""Regular languages of exactly the numbers within bounds.

A whole number fits 64 bits. A decimal has at most 15 digits in all, and no exponent: such decimals
map to distinct floats in the same order, so bounds hold for the texts and for their floats. Neither
has superfluous leading zeros; zero has no sign.

Equal parts are the same object, so that an automaton contains them once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

from beam_gemma.structured.grammar import (
    EMPTY,
    Chars,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    chars,
    one_of,
    optional,
)

INT64_DIGITS = 19
MAX_DIGITS = 15
"""Maximum digits of a decimal, those before and after the point together."""

MAX_LISTED = 1_000
"""Maximum multiples, or last digits of multiples, that are written out one by one."""

POINT, MINUS = Literal("."), Literal("-")


@dataclass(frozen=True, slots=True)
class Bound:
    """A lower or an upper bound."""

    value: Fraction
    is_open: bool
    """True if the bound excludes the value itself."""

    def lowest(self, unit: int) -> int:
        """Return the lowest n for which n / unit satisfies this lower bound."""
        scaled = self.value * unit
        return math.floor(scaled) + 1 if self.is_open else math.ceil(scaled)

    def highest(self, unit: int) -> int:
        """Return the highest n for which n / unit satisfies this upper bound."""
        scaled = self.value * unit
        return math.ceil(scaled) - 1 if self.is_open else math.floor(scaled)


@dataclass(frozen=True, slots=True)
class Span:
    """Unsigned numbers of `num_whole` digits before the point and at most `places` after it."""

    num_whole: int
    places: int
    low: str
    """Digits of the lowest number, without the point."""
    high: str
    """Digits of the highest number, without the point."""
    is_full: bool
    """True if the span contains all numbers with as many digits."""


def integers(lows: Sequence[Bound], highs: Sequence[Bound]) -> Language | None:
    """Return the whole numbers of 64 bits within bounds; None if there are none."""
    lowest, highest = (Bound(Fraction(limit), is_open=False) for limit in (-(2**63), 2**63 - 1))
    return _numbers((lowest, *lows), (highest, *highs), INT64_DIGITS, 0)


def is_listable(step: int, lowest: int, highest: int) -> bool:
    """Return whether the multiples of a number within bounds can be written out by `multiples`."""
    return (highest - lowest) // step <= MAX_LISTED or _num_ending(step) is not None


def multiples(step: int, lowest: int, highest: int) -> Language | None:
    """Return the multiples of a number from `lowest` to `highest`, of at most 64 bits, if any."""
    first, last = -(-lowest // step), highest // step
    if first > last:
        return None
    if step == 1:
        return integers([Bound(Fraction(first), False)], [Bound(Fraction(last), False)])
    if last - first <= MAX_LISTED:
        return one_of(Literal(str(number * step)) for number in range(first, last + 1))
    options = _by_endings(step, max(lowest, 0), highest)
    if below_zero := _by_endings(step, max(-highest, 1), -lowest):
        options.append(Concat((MINUS, one_of(below_zero))))
    return one_of(options)


def _num_ending(step: int) -> int | None:
    """Return how many last digits tell whether a number is a multiple; None if they are many."""
    counts = range(1, INT64_DIGITS)
    num_digits = next((count for count in counts if 10**count % step == 0), None)
    return None if num_digits is None or 10**num_digits // step > MAX_LISTED else num_digits


def _by_endings(step: int, low: int, high: int) -> list[Language]:
    """Return the unsigned multiples from `low` to `high`: any digits, then one of some endings."""
    num_digits = _num_ending(step)
    assert num_digits is not None, step
    unit = 10**num_digits
    short = [Literal(str(number)) for number in range(0, unit, step) if low <= number <= high]
    endings: dict[tuple[int, int], list[Language]] = {}
    for number in range(0, unit, step):
        before = max(-((number - low) // unit), 1), (high - number) // unit
        if before[0] <= before[1]:
            endings.setdefault(before, []).append(Literal(f"{number:0{num_digits}d}"))
    options: list[Language] = [one_of(short)] if short else []
    for (first, last), texts in endings.items():
        digits = integers([Bound(Fraction(first), False)], [Bound(Fraction(last), False)])
        assert digits is not None, (first, last)
        options.append(Concat((digits, one_of(texts))))
    return options


def decimals(
    lows: Sequence[Bound], highs: Sequence[Bound], max_places: int = MAX_DIGITS
) -> Language | None:
    """Return the decimals within bounds; None if there are none.

    Args:
        lows: The lower bounds, all of which hold.
        highs: The upper bounds, all of which hold.
        max_places: The maximum number of digits after the point.
    """
    return _numbers(tuple(lows), tuple(highs), MAX_DIGITS, max_places)


@lru_cache(maxsize=1024)
def _numbers(
    lows: tuple[Bound, ...], highs: tuple[Bound, ...], max_digits: int, max_places: int
) -> Language | None:
    """Return the numbers within bounds; digits not used before the point may come after it."""
    positive: list[Span] = []
    negative: list[Span] = []
    for num_whole in range(1, max_digits + 1):
        places = min(max_places, max_digits - num_whole)
        unit = 10**places
        beyond = 10**num_whole * unit
        low = max((bound.lowest(unit) for bound in lows), default=-beyond)
        high = min((bound.highest(unit) for bound in highs), default=beyond)
        positive += _span(max(low, 0), high, num_whole, places)
        negative += _span(max(-high, 1), -low, num_whole, places)
    options = _unsigned(positive)
    if below_zero := _unsigned(negative):
        options.append(Concat((MINUS, OneOf(tuple(below_zero)))))
    return OneOf(tuple(options)) if options else None


def _span(low: int, high: int, num_whole: int, places: int) -> list[Span]:
    """Return the span of numbers from `low` to `high`, in units of the last place, if any."""
    num_digits = num_whole + places
    least = 10 ** (num_digits - 1) if num_whole > 1 else 0
    most = 10**num_digits - 1
    first, last = max(low, least), min(high, most)
    if first > last:
        return []
    low_digits, high_digits = (f"{number:0{num_digits}d}" for number in (first, last))
    is_full = (first, last) == (least, most)
    return [Span(num_whole, places, low_digits, high_digits, is_full)]


def _unsigned(spans: Sequence[Span]) -> list[Language]:
    """Return languages of the spans' numbers; full spans, which are consecutive, are combined."""
    options = [_digits(s.low, s.high, s.num_whole) for s in spans if not s.is_full]
    full = [span for span in spans if span.is_full]
    if full:
        options += _all([span.places for span in full], full[0].num_whole)
    return options


def _all(places: Sequence[int], num_whole: int) -> list[Language]:
    """Return all numbers with `num_whole` or up to `len(places) - 1` more digits before the point.

    Args:
        places: The maximum digits after the point, for each number of digits before it.
        num_whole: The minimum digits before the point.
    """
    tail = _fraction(places[-1])
    for most in reversed(places[:-1]):
        tail = OneOf((_fraction(most), Concat((_digit(0, 9), tail))))
    if not any(places):
        tail = Repeat(_digit(0, 9), 0, len(places) - 1)
    nonzero = Concat((_digit(1, 9), _whole(num_whole - 1), tail))
    return [nonzero] if num_whole > 1 else [Concat((_digit(0, 0), _fraction(places[0]))), nonzero]


def _digits(low: str, high: str, num_whole: int) -> Language:
    """Return digits from `low` to `high`; trailing zeros after the point may be missing.

    Args:
        low: The lowest digits, without the point.
        high: The highest digits, as many as in `low`.
        num_whole: The number of these digits before the point; negative after the point.
    """
    first, last = int(low[0]), int(high[0])
    if first == last:
        return Concat((_digit(first, last), _rest(low[1:], high[1:], num_whole - 1)))
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    options: list[Language] = []
    if low[1:] != zeros:
        options.append(Concat((_digit(first, first), _rest(low[1:], nines, num_whole - 1))))
        first += 1
    if high[1:] != nines:
        options.append(Concat((_digit(last, last), _rest(zeros, high[1:], num_whole - 1))))
        last -= 1
    if first <= last:
        options.append(Concat((_digit(first, last), _rest(zeros, nines, num_whole - 1))))
    return OneOf(tuple(options))


def _rest(low: str, high: str, num_whole: int) -> Language:
    """Return what follows a digit: the point, if it is due, and the digits `low` to `high`."""
    num_digits = len(low)
    zeros, nines = "0" * num_digits, "9" * num_digits
    if not num_digits:
        return EMPTY
    if num_whole >= 0 and (low, high) == (zeros, nines):
        return Concat((_whole(num_whole), _fraction(num_digits - num_whole)))
    if num_whole < 0 and low == zeros and high in (zeros, nines):
        return Repeat(_digit(0, int(high[0])), 0, num_digits)
    more = _digits(low, high, num_whole)
    if num_whole == 0:
        more = Concat((POINT, more))
    return optional(more) if num_whole <= 0 and low == zeros else more


@cache
def _whole(num_digits: int) -> Language:
    return Repeat(_digit(0, 9), num_digits, num_digits) if num_digits else EMPTY


@cache
def _fraction(places: int) -> Language:
    return optional(Concat((POINT, Repeat(_digit(0, 9), 1, places)))) if places else EMPTY


@cache
def _digit(first: int, last: int) -> Chars:
    return chars((ord("0") + first, ord("0") + last))
