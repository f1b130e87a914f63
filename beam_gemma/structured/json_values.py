"""JSON values: their texts, their Arrow types and their conversion for `pa.array`."""

import datetime as dt
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from beam_gemma.structured.grammar import Language, one_of
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
    """Values of the properties that objects always have in their texts, by name."""
    is_nullable: bool = False
    """True if null is one of the values."""
    widened: Callable[[], "Values"] | None = None
    """Makes the same values as doubles, if they are whole numbers."""
    num_fields: int = 1
    """Number of values, and fields and lists around them, that the type has places for."""
    num_levels: int = 0
    """Number of structs and lists within each other in the type."""


def union(options: Sequence[Values]) -> Values:
    """Return the values of all options; null fits any type, and objects combine their properties.

    Raises:
        pa.ArrowTypeError: the options have no common type.
    """
    if len(options) == 1:
        return options[0]
    types = {option.type: option for option in options}
    listed = [option.listed for option in options if option.listed is not None]
    languages = {id(option.language): option.language for option in options}
    kind = pa.unify_schemas([pa.schema([("", each)]) for each in types]).field(0).type
    return Values(
        language=one_of(languages.values()),
        type=kind,
        kinds=frozenset[str]().union(*(option.kinds for option in options)),
        listed=frozenset[Any]().union(*listed) if len(listed) == len(options) else None,
        is_nullable=any(option.is_nullable for option in options),
        num_fields=_num_fields(kind),
        num_levels=max(option.num_levels for option in options),
    )


def _num_fields(kind: pa.DataType) -> int:
    return 1 + sum(_num_fields(kind.field(index).type) for index in range(kind.num_fields))


def may_share(one: Values, other: Values, known: dict[tuple[int, int], bool]) -> bool:
    """Return whether both may contain the same value; only False is certain.

    Args:
        one: Some values.
        other: Other values.
        known: The answers for two values by their `id`, as objects may have the same repeatedly.
    """
    pair = (id(one), id(other))
    if pair not in known:
        known[pair] = _may_share(one, other, known)
    return known[pair]


def _may_share(one: Values, other: Values, known: dict[tuple[int, int], bool]) -> bool:
    if not one.kinds & other.kinds:
        return False
    if one.listed is not None and other.listed is not None:
        return not one.listed.isdisjoint(other.listed)
    common = one.required.keys() & other.required.keys()
    return all(may_share(one.required[name], other.required[name], known) for name in common)


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
    if pa.types.is_map(kind):
        return {name: arrow_value(item, kind.item_type) for name, item in value.items()}
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
