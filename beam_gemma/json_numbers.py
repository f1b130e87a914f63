"""Texts of the numbers within bounds, exactly, as regular languages.

A whole number fits 64 bits. A decimal has at most 15 digits in all, and no exponent: each of these
is a float of its own, in the order of the numbers, so bounds hold for the texts and for their
floats. Neither begins with a zero that says nothing; zero has no sign.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from beam_gemma.language import EMPTY, Concat, Language, Literal, OneOf, Repeat, chars, optional

INT64_DIGITS = 19
MAX_DIGITS = 15
"""Of a decimal: before the point and after it."""

POINT = Literal(".")


@dataclass(frozen=True, slots=True)
class Bound:
    """Where numbers begin or end."""

    value: Fraction
    is_open: bool
    """Whether the value itself is out of bounds."""

    def lowest(self, unit: int) -> int:
        """Return the lowest n for which n / unit is not below the bound."""
        scaled = self.value * unit
        return math.floor(scaled) + 1 if self.is_open else math.ceil(scaled)

    def highest(self, unit: int) -> int:
        """Return the highest n for which n / unit is not above the bound."""
        scaled = self.value * unit
        return math.ceil(scaled) - 1 if self.is_open else math.floor(scaled)


def integers(lows: Sequence[Bound], highs: Sequence[Bound]) -> Language | None:
    """Return the whole numbers of 64 bits within bounds; None if there are none."""
    lowest, highest = (Bound(Fraction(limit), is_open=False) for limit in (-(2**63), 2**63 - 1))
    return _numbers([lowest, *lows], [highest, *highs], INT64_DIGITS, 0)


def decimals(
    lows: Sequence[Bound], highs: Sequence[Bound], max_places: int = MAX_DIGITS
) -> Language | None:
    """Return the decimals within bounds; None if there are none.

    Args:
        lows: None of which a number is below.
        highs: None of which a number is above.
        max_places: Digits after the point.
    """
    return _numbers(lows, highs, MAX_DIGITS, max_places)


def _numbers(
    lows: Sequence[Bound], highs: Sequence[Bound], max_digits: int, max_places: int
) -> Language | None:
    """Return numbers by their digits before the point, which leave the others for after it."""
    options: list[Language] = []
    for num_whole in range(1, max_digits + 1):
        places = min(max_places, max_digits - num_whole)
        unit = 10**places
        beyond = 10 ** (num_whole + places)
        low = max((bound.lowest(unit) for bound in lows), default=-beyond)
        high = min((bound.highest(unit) for bound in highs), default=beyond)
        options += _unsigned(max(low, 0), high, num_whole, places)
        options += (
            Concat((Literal("-"), digits))
            for digits in _unsigned(max(-high, 1), -low, num_whole, places)
        )
    return OneOf(tuple(options)) if options else None


def _unsigned(low: int, high: int, num_whole: int, places: int) -> Iterator[Language]:
    """Yield the numbers of so many digits, before the point and at most after it, if any.

    Args:
        low: Not negative; like `high` a number of units of the last place.
        high: The greatest.
        num_whole: Digits before the point.
        places: Digits after the point.
    """
    num_digits = num_whole + places
    first = max(low, 10 ** (num_digits - 1) if num_whole > 1 else 0)
    last = min(high, 10**num_digits - 1)
    if first <= last:
        yield _digits(f"{first:0{num_digits}d}", f"{last:0{num_digits}d}", num_whole)


def _digits(low: str, high: str, num_whole: int) -> Language:
    """Return digits from `low` to `high`; zeros at the end of those after the point may be missing.

    Args:
        low: Digits.
        high: As many, none or more of them behind the point.
        num_whole: Digits before the point; negative behind it.
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
    """Return what follows a digit."""
    if _is_any(low, high):
        return _any_digits(len(low), num_whole)
    if num_whole < 0 and not high.strip("0"):
        return Repeat(_digit(0, 0), 0, len(low))
    more = _digits(low, high, num_whole)
    if num_whole > 0:
        return more
    if num_whole == 0:
        more = Concat((POINT, more))
    return more if low.strip("0") else optional(more)


def _is_any(low: str, high: str) -> bool:
    return not low.strip("0") and not high.strip("9")


def _any_digits(num_digits: int, num_whole: int) -> Language:
    if not num_digits:
        return EMPTY
    digit = _digit(0, 9)
    if num_whole < 0:
        return Repeat(digit, 0, num_digits)
    whole, places = Repeat(digit, num_whole, num_whole), num_digits - num_whole
    if not places:
        return whole
    fraction = optional(Concat((POINT, Repeat(digit, 1, places))))
    return Concat((whole, fraction)) if num_whole else fraction


def _digit(first: int, last: int) -> Language:
    return chars((ord("0") + first, ord("0") + last))
