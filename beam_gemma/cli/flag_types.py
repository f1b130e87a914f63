"""Parse flag values for argparse."""

import argparse
import math
from typing import Any

WORDS = {"true": True, "false": False}


def switch(text: str) -> bool:
    """Parse `true` or `false`."""
    if text not in WORDS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return WORDS[text]


SWITCH: dict[str, Any] = {
    "nargs": "?",
    "const": True,
    "default": False,
    "type": switch,
    "metavar": "BOOL",
}
"""Arguments of a boolean flag: true if it has no value; Dataflow templates pass a value."""


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _at_least(1, text)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def rising(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers of at least 1 in strictly increasing order."""
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1 or list(numbers) != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"expected rising numbers such as 16,64, got {text!r}")
    return numbers


def column_names(text: str) -> tuple[str, ...]:
    """Parse comma-separated column names."""
    return tuple(name.strip() for name in text.split(","))


def _at_least(minimum: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number from {minimum}, got {text!r}")
    return value
