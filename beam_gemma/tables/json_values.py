"""Arrow values as JSON has them: numbers, texts, lists and objects, of every Arrow type.

Times are texts in ISO 8601, durations are seconds, decimals and UUIDs are texts, bytes are in
base64. NaN and infinity, which JSON lacks, are null.
"""

import base64
import json
import math
import uuid
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from beam_gemma.batches import UNITS, is_json_text, time_text


def column_values(field: pa.Field, column: pa.Array) -> list[Any]:
    """Return the values of a table's column; JSON text becomes the values that it says."""
    if not is_json_text(field):
        return json_values(column)
    return [None if text is None else _parsed(text) for text in column.to_pylist()]


def json_values(array: pa.Array) -> list[Any]:
    """Return the values of an array in a form that `json.dumps` accepts."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _uuids(array) if kind == pa.uuid() else json_values(array.storage)
    if pa.types.is_dictionary(kind):
        return json_values(array.dictionary_decode())
    if pa.types.is_struct(kind):
        return _objects(array)
    if pa.types.is_map(kind):
        pairs = array.cast(pa.list_(pa.struct([("k", kind.key_type), ("v", kind.item_type)])))
        return [
            None if each is None else {_key(pair["k"]): pair["v"] for pair in each}
            for each in _lists(pairs)
        ]
    if is_list(kind):
        return list(_lists(array))
    return _plain(array)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's list types."""
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; Python's parser takes the words NaN and Infinity."""
    return json.loads(text, parse_constant=lambda _: None)


def _uuids(array: pa.ExtensionArray) -> list[str | None]:
    raw = array.storage.to_pylist()
    return [None if value is None else str(uuid.UUID(bytes=value)) for value in raw]


def _objects(array: pa.StructArray) -> list[dict[str, Any] | None]:
    names = [field.name for field in array.type]
    columns = [json_values(column) for column in array.flatten()]
    if not columns:
        return [{} if valid else None for valid in array.is_valid().to_pylist()]
    return [
        dict(zip(names, row, strict=True)) if valid else None
        for valid, row in zip(array.is_valid().to_pylist(), zip(*columns, strict=True), strict=True)
    ]


def _lists(array: pa.Array) -> Iterator[list[Any] | None]:
    if pa.types.is_fixed_size_list(array.type):
        lengths = [
            array.type.list_size if valid else None for valid in array.is_valid().to_pylist()
        ]
    else:
        # A view's length is 0 where it is null.
        lengths = [
            length if valid else None
            for length, valid in zip(
                pc.list_value_length(array).to_pylist(), array.is_valid().to_pylist(), strict=True
            )
        ]
    values = iter(json_values(array.flatten()))
    for length in lengths:
        yield None if length is None else list(islice(values, length))


def _key(value: Any) -> str:
    """Return the key of a map as the key of an object."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(array: pa.Array) -> list[Any]:
    """Return the values of an array that is not nested."""
    kind = array.type
    if pa.types.is_floating(kind):
        return [v if v is not None and math.isfinite(v) else None for v in array.to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if value is None else str(value) for value in array.to_pylist()]
    if pa.types.is_duration(kind):
        numbers = array.cast(pa.int64()).to_pylist()
        return [None if number is None else number / UNITS[kind.unit] for number in numbers]
    if pa.types.is_temporal(kind):
        return _times(array)
    if _is_binary(kind):
        return [
            None if value is None else base64.b64encode(value).decode()
            for value in array.to_pylist()
        ]
    try:
        return array.to_pylist()
    except UnicodeDecodeError:  # Parquet files may have such texts
        raw = array.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="replace") for value in raw]


def _times(array: pa.Array) -> list[str | None]:
    try:
        return [None if value is None else value.isoformat() for value in array.to_pylist()]
    except (ValueError, OverflowError, KeyError):  # a year, nanosecond or zone Python lacks
        return [_time(value) for value in array]


def _time(value: pa.Scalar) -> str | None:
    """Return one time, each in the form that it has in the company of others."""
    try:
        return None if (found := value.as_py()) is None else found.isoformat()
    except (ValueError, OverflowError, KeyError):
        return time_text(value)


def _is_binary(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(check(kind) for check in checks)
