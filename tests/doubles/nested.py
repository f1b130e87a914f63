"""Values that hold values that hold values."""

from typing import Any


def nested(levels: int) -> Any:
    """Return a list in a list, of so many levels, around a zero."""
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value
