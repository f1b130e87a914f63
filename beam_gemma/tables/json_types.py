"""The types of JSON lines: what all values of a column have in common, found before a job.

A column gets an Arrow type if that type holds each of its values as it is written: whole numbers
up to 64 bits, other numbers, texts, lists, and objects with the same keys in the same order. Any
other column holds JSON text, so that no value depends on those of other rows.
"""

import base64
import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from beam_gemma.batches import JSON_TEXT, is_json_text

MAX_KEYS = 256
MAX_DEPTH = 32
"""Objects with more keys and values nested more deeply are kept as JSON text. Arrow's own limit of
depth is 64."""
EXACT_FLOATS = 2**53
"""Whole numbers up to here have a double of the same value."""
KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list or an object",
    dict: "a list or an object",
}
"""What messages call a value; values of different kinds do not make one column."""


class Values:
    """What is known of the values at one place: a column, the items of its lists, a key."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self._bounds = (0, 0)
        self._items: Values | None = None
        self._fields: dict[str, Values] | None = None
        self._in_order = True
        self._is_free = False

    def add(self, values: Sequence[Any], depth: int = 0) -> None:
        """Take account of values, which lie in as many lists and objects as `depth` says."""
        kinds = set(map(type, values)) - {type(None)}
        self.kinds |= kinds
        if int in kinds:
            whole = [value for value in values if type(value) is int]
            self._bounds = (min(self._bounds[0], *whole), max(self._bounds[1], *whole))
        if depth == MAX_DEPTH and kinds & {list, dict}:
            self._is_free = True
        if self._is_free:
            return
        if list in kinds:
            lists = (value for value in values if type(value) is list)
            self._items = self._items or Values()
            self._items.add(list(itertools.chain.from_iterable(lists)), depth + 1)
        if dict in kinds:
            self._add_objects([value for value in values if type(value) is dict], depth)

    def _add_objects(self, objects: list[dict[str, Any]], depth: int) -> None:
        orders = dict.fromkeys(map(tuple, objects))
        if self._fields is None:
            self._fields = {key: Values() for key in next(iter(orders))}
        known = tuple(self._fields)
        self._in_order &= set(orders) <= {known}
        if any(set(order) != set(known) for order in orders) or not 0 < len(known) <= MAX_KEYS:
            self._is_free, self._fields = True, {}
        for key, values in self._fields.items():
            values.add([each[key] for each in objects], depth + 1)

    def arrow_type(self, *, as_written: bool = True) -> pa.DataType | None:
        """Return the Arrow type that holds all values, or None if there is none.

        Args:
            as_written: Whether the type must hold the order of keys and tell 5 from 5.0.
        """
        if self._is_free or (as_written and not self._in_order):
            return None
        if self.kinds == {list}:
            assert self._items is not None
            item = self._items._inner_type(as_written=as_written)
            return None if item is None else pa.list_(item)
        if self.kinds == {dict}:
            assert self._fields is not None
            kinds = {k: v._inner_type(as_written=as_written) for k, v in self._fields.items()}
            is_whole = all(kind is not None for kind in kinds.values())
            return pa.struct(list(kinds.items())) if is_whole else None
        if self.kinds == {int, float} and not as_written:
            is_exact = self._bounds[0] >= -EXACT_FLOATS and self._bounds[1] <= EXACT_FLOATS
            return pa.float64() if is_exact else None
        if self.kinds == {int}:
            return self._whole_type()
        if not self.kinds:
            return pa.null()
        simple = {bool: pa.bool_(), float: pa.float64(), str: pa.string()}
        return simple.get(*self.kinds) if len(self.kinds) == 1 else None

    def _inner_type(self, *, as_written: bool) -> pa.DataType | None:
        """Return the type inside of a list or object, where nulls alone have the type of texts."""
        kind = self.arrow_type(as_written=as_written)
        return pa.string() if kind == pa.null() else kind

    def _whole_type(self) -> pa.DataType | None:
        low, high = self._bounds
        if low >= -(2**63) and high < 2**63:
            return pa.int64()
        return pa.uint64() if low == 0 and high < 2**64 else None

    def field(self, name: str) -> pa.Field:
        """Return the field of a column of these values, of JSON text if it must be."""
        kind = self.arrow_type()
        if kind is not None:
            return pa.field(name, kind)
        typed = self.arrow_type(as_written=False)
        plain = b"" if typed is None else base64.b64encode(pa.schema([("", typed)]).serialize())
        return pa.field(name, pa.string(), metadata={JSON_TEXT: plain})


def typed_form(field: pa.Field) -> pa.Field:
    """Return the field as Parquet holds it: JSON text has another type if one holds all values.

    A column of 5 and 2.5 has a type of doubles, which hold both values, though not that the first
    was written without a point. Its mark is gone.
    """
    if not is_json_text(field):
        return field
    metadata = {key: value for key, value in field.metadata.items() if key != JSON_TEXT}
    plain = base64.b64decode(field.metadata[JSON_TEXT])
    kind = pa.ipc.read_schema(pa.py_buffer(plain)).field(0).type if plain else field.type
    return pa.field(field.name, kind, field.nullable, metadata or None)
