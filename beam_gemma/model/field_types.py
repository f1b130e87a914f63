"""Checks the values in a dataclass, read from JSON, against the types of its fields."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_INT = 2**63 - 1
MAX_FLOAT = 1e300


def first_fault(value: Any) -> str | None:
    """Return what is wrong with the first field of a dataclass that has another type, or None.

    Whole numbers are counts and ids: from 0 to `MAX_INT`. Other numbers are at most `MAX_FLOAT` in
    magnitude, and whole ones are among them.
    """
    return next(_faults(type(value), value, ""), None)


def _faults(kind: Any, value: Any, place: str) -> Iterator[str]:
    if get_origin(kind) in (Union, types.UnionType):
        if any(next(_faults(arg, value, place), None) is None for arg in get_args(kind)):
            return
        parts = None
    else:
        parts = _parts(kind, value)
    if parts is None:
        yield f"{_shown(value)} for {place}"
    for inner, item, name in parts or ():
        yield from _faults(inner, item, f"{place}{name}".lstrip("."))


def _parts(kind: Any, value: Any) -> list[tuple[Any, Any, str]] | None:
    """Return the parts of a value, each with its type and place; None if the type is another."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, tuple):
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        pairs = enumerate(zip(kinds, value, strict=False))
        parts = [(inner, item, f"[{index}]") for index, (inner, item) in pairs]
        return parts if len(kinds) == len(value) else None
    if origin is Mapping and isinstance(value, Mapping):
        keys = [(args[0], key, ", a key") for key in value]
        return keys + [(args[1], item, f"[{key!r:.80}]") for key, item in value.items()]
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, kind):
        return [(inner, getattr(value, name), f".{name}") for name, inner in _fields(kind)]
    if origin is Literal:
        return [] if isinstance(value, str) and value in args else None
    return [] if _is_plain(kind, value) else None


def _is_plain(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and 0 <= value <= MAX_INT
    if kind is float:
        return isinstance(value, int | float) and -MAX_FLOAT <= value <= MAX_FLOAT
    return isinstance(kind, type) and isinstance(value, kind)


def _shown(value: Any) -> str:
    """Return a value as a message quotes it: short, and never a number of thousands of digits."""
    if value is None or isinstance(value, bool | float | str):
        return f"{value!r:.40}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) <= MAX_INT else "a number beyond 64 bits"
    return f"a {type(value).__name__}"


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))
