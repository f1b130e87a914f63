"""One schema for the Parquet files of a table, which several writers may have written.

Types that differ are unified where nothing is lost: to the wider integer, to the finer time, to
large texts. Dictionaries get codes of 32 bits, for those of one file need not hold the values of
all files.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from beam_gemma.errors import OptionsError
from beam_gemma.tables.json_values import is_list

ENGINE_KEYS = (
    b"org.apache.spark.",
    b"org.apache.hive",
    b"parquet.avro.",
    b"avro.",
    b"parquet.proto.",
    b"parquet.thrift.",
    b"thrift.",
    b"writer.",
    b"iceberg.",
    b"delta.",
    b"hoodie",
    b"org.apache.hudi",
    b"org.apache.iceberg",
    b"org.apache.parquet.",
    b"trino",
    b"presto",
    b"ARROW:",
)
"""Prefixes of the keys under which engines describe the columns and themselves, as they wrote the
file. In an output, which has more columns, readers would believe the key: Spark shows no others."""
PANDAS = b"pandas"
UNITS = ("s", "ms", "us", "ns")


def agreed(schema: pa.Schema, found: pa.Schema, path: str) -> pa.Schema:
    """Return the merged schema of earlier files and one more file, in the order of the first.

    A column is nullable if any file says so; a column of nulls takes its type from another file.

    Raises:
        OptionsError: the file has other columns, or types that do not unify without a loss.
    """
    if names := sorted(set(schema.names) ^ set(found.names)):
        raise _disagreement(path, f"set of columns: {', '.join(names)}")
    fields = []
    for ours in schema:
        theirs = found.field(ours.name)
        kind = unified(ours.type, theirs.type)
        if kind is None:
            raise _disagreement(path, f"type of {ours.name!r}: {theirs.type} for {ours.type}")
        fields.append(ours.with_type(kind).with_nullable(ours.nullable or theirs.nullable))
    return pa.schema(fields, schema.metadata)


def _disagreement(path: str, what: str) -> OptionsError:
    return OptionsError(
        f"{path}: expected the columns of the files before it, got another {what}; read them "
        "apart, or leave it out with --columns"
    )


def unified(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both types without a loss; None if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(other):
        return unified(_plain(one), _plain(other))
    for rule in (_text, _binary, _whole, _float, _decimal, _time, _list, _struct, _map):
        if (kind := rule(one, other)) is not None:
            return kind
    return None


def widened(kind: pa.DataType) -> pa.DataType:
    """Return the type with dictionary codes of at least 32 bits."""
    if pa.types.is_dictionary(kind):
        index = kind.index_type if kind.index_type.bit_width >= 32 else pa.int32()
        return pa.dictionary(index, widened(kind.value_type), kind.ordered)
    return with_inner(kind, widened)


def with_inner(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a nested type with its inner types changed, any other type as it is."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(change(field.type)) for field in kind])
    if pa.types.is_map(kind):
        # Change the fields, which have names and nullability of their own.
        key, item = (f.with_type(change(f.type)) for f in (kind.key_field, kind.item_field))
        return pa.map_(key, item, kind.keys_sorted)
    if is_list(kind):
        return _like(kind, kind.value_field.with_type(change(kind.value_type)))
    return kind


def kept_metadata(
    metadata: Mapping[bytes, bytes] | None, names: Sequence[str]
) -> dict[bytes, bytes] | None:
    """Return a table's metadata without what engines say of the columns that they wrote.

    What pandas says is kept for the columns that are read.
    """
    kept = {
        key: value for key, value in (metadata or {}).items() if not key.startswith(ENGINE_KEYS)
    }
    if PANDAS in kept:
        kept[PANDAS] = _of_columns(kept[PANDAS], names)
    return kept or None


def _of_columns(pandas: bytes, names: Sequence[str]) -> bytes:
    """Return pandas' metadata for some of its columns; unreadable metadata is kept as it is."""
    try:
        told: dict[str, Any] = json.loads(pandas)
        told["columns"] = [c for c in told["columns"] if c["field_name"] in names]
        # An index is a column, or a range in the words of an object.
        index = told["index_columns"]
        told["index_columns"] = [c for c in index if not isinstance(c, str) or c in names]
    except (ValueError, KeyError, TypeError):
        return pandas
    return json.dumps(told).encode()


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _like(kind: pa.DataType, value: pa.Field) -> pa.DataType:
    """Return a list type of the same kind with another value field."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(value, kind.list_size)
    for is_kind, make in (
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_list_view, pa.list_view),
        (pa.types.is_large_list_view, pa.large_list_view),
    ):
        if is_kind(kind):
            return make(value)
    return pa.list_(value)


def _text(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    texts = {pa.string(), pa.large_string(), pa.string_view()}
    if not {one, other} <= texts:
        return None
    return pa.large_string() if pa.large_string() in (one, other) else pa.string()


def _binary(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    def is_binary(kind: pa.DataType) -> bool:
        return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or (
            pa.types.is_fixed_size_binary(kind)
        )

    if not (is_binary(one) and is_binary(other)):
        return None
    return pa.large_binary() if pa.large_binary() in (one, other) else pa.binary()


def _whole(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_integer(one) and pa.types.is_integer(other)):
        return None
    signed = [pa.types.is_signed_integer(kind) for kind in (one, other)]
    if all(signed) or not any(signed):
        return max(one, other, key=lambda kind: kind.bit_width)
    # A signed type of twice the bits holds the values of an unsigned one.
    bits = max(
        kind.bit_width if is_signed else 2 * kind.bit_width
        for kind, is_signed in zip((one, other), signed, strict=True)
    )
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)


def _float(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Doubles hold integers of 32 bits as well."""
    kinds = (one, other)
    if all(map(pa.types.is_floating, kinds)):
        return max(kinds, key=lambda kind: kind.bit_width)
    small = [pa.types.is_integer(kind) and kind.bit_width <= 32 for kind in kinds]
    return pa.float64() if pa.float64() in kinds and any(small) else None


def _decimal(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_decimal(one) and pa.types.is_decimal(other)):
        return None
    scale = max(one.scale, other.scale)
    precision = scale + max(one.precision - one.scale, other.precision - other.scale)
    if precision > 76:
        return None
    return (pa.decimal128 if precision <= 38 else pa.decimal256)(precision, scale)


def _time(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = (one, other)
    if all(map(pa.types.is_date, kinds)):
        return pa.date32()
    for is_kind, make in (
        (pa.types.is_timestamp, lambda unit: pa.timestamp(unit, one.tz)),
        (pa.types.is_duration, pa.duration),
        (pa.types.is_time, lambda unit: (pa.time32 if unit in ("s", "ms") else pa.time64)(unit)),
    ):
        if all(map(is_kind, kinds)):
            has_same_zone = getattr(one, "tz", None) == getattr(other, "tz", None)
            unit = max(one.unit, other.unit, key=UNITS.index)
            return make(unit) if has_same_zone else None
    return None


def _list(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (is_list(one) and is_list(other)):
        return None
    value = _field(one.value_field, other.value_field)
    if value is None:
        return None
    larges = (pa.types.is_large_list, pa.types.is_large_list_view)
    if any(is_large(kind) for is_large in larges for kind in (one, other)):
        return pa.large_list(value)
    is_fixed = pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other)
    if is_fixed and one.list_size == other.list_size:
        return pa.list_(value, one.list_size)
    return pa.list_(value)


def _struct(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_struct(one) and pa.types.is_struct(other)):
        return None
    if [field.name for field in one] != [field.name for field in other]:
        return None
    fields = [_field(ours, theirs) for ours, theirs in zip(one, other, strict=True)]
    return None if any(field is None for field in fields) else pa.struct(fields)


def _map(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_map(one) and pa.types.is_map(other)):
        return None
    key = _field(one.key_field, other.key_field)
    item = _field(one.item_field, other.item_field)
    return None if key is None or item is None else pa.map_(key, item)


def _field(ours: pa.Field, theirs: pa.Field) -> pa.Field | None:
    kind = unified(ours.type, theirs.type)
    if kind is None:
        return None
    return ours.with_type(kind).with_nullable(ours.nullable or theirs.nullable)
