"""JSON values: their texts, their Arrow types and their conversion for `pa.array`."""

import datetime as dt
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from beam_gemma.structured.grammar import Language, OneOf
from beam_gemma.structured.json_formats import TIME, TIMESTAMP


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """The valid values at one place in a schema."""

    language: Language
    """Language of their texts."""
    type: pa.DataType
    kinds: frozenset[str]
    """JSON types of the values; a whole number is a `number`."""
    listed: frozenset[Any] | None = None
    """All values, if they are constants, booleans or null; else None."""
    required: Mapping[str, "Values"] = field(default_factory=dict)
    """Values of the properties that objects always have, by name."""


def union(options: Sequence[Values]) -> Values:
    """Return the values of all options; null fits any type, and objects combine their properties.

    Raises:
        pa.ArrowTypeError: the options have no common type.
    """
    if len(options) == 1:
        return options[0]
    types = dict.fromkeys(option.type for option in options)
    listed = [option.listed for option in options if option.listed is not None]
    return Values(
        language=OneOf(tuple(option.language for option in options)),
        type=pa.unify_schemas([pa.schema([("", each)]) for each in types]).field(0).type,
        kinds=frozenset[str]().union(*(option.kinds for option in options)),
        listed=frozenset[Any]().union(*listed) if len(listed) == len(options) else None,
    )


def may_share(one: Values, other: Values) -> bool:
    """Return whether both may contain the same value; only False is certain."""
    if not one.kinds & other.kinds:
        return False
    if one.listed is not None and other.listed is not None:
        return bool(one.listed & other.listed)
    common = one.required.keys() & other.required.keys()
    return all(may_share(one.required[name], other.required[name]) for name in common)


def json_text(value: Any) -> str:
    """Return the compact text of a value, which has no spaces and only necessary escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def arrow_value(value: Any, kind: pa.DataType) -> Any:
    """Convert a JSON value to the form that `pa.array` takes; missing fields become null."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {each.name: arrow_value(value.get(each.name), each.type) for each in kind}
    if pa.types.is_list(kind):
        return [arrow_value(item, kind.value_type) for item in value]
    return _SCALARS[kind](value)


def _time(text: str) -> dt.time:
    return dt.time.fromisoformat(text).replace(tzinfo=None)


_SCALARS: dict[pa.DataType, Callable[[Any], Any]] = {
    pa.bool_(): bool,
    pa.int64(): int,
    pa.float64(): float,
    pa.string(): str,
    pa.date32(): dt.date.fromisoformat,
    TIME: _time,
    TIMESTAMP: dt.datetime.fromisoformat,
}
