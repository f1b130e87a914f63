"""Convert BigQuery schemas to Arrow schemas and back."""

import re
from collections.abc import Sequence

import pyarrow as pa
from google.cloud.bigquery import SchemaField

from beam_gemma.errors import OptionsError

ARROW_TYPES: dict[str, pa.DataType] = {
    "STRING": pa.string(),
    "BYTES": pa.binary(),
    "INTEGER": pa.int64(),
    "INT64": pa.int64(),
    "FLOAT": pa.float64(),
    "FLOAT64": pa.float64(),
    "NUMERIC": pa.decimal128(38, 9),
    "BIGNUMERIC": pa.decimal256(76, 38),
    "BOOLEAN": pa.bool_(),
    "BOOL": pa.bool_(),
    "DATE": pa.date32(),
    "TIME": pa.time64("us"),
    "DATETIME": pa.timestamp("us"),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "JSON": pa.string(),
    "GEOGRAPHY": pa.string(),
}
"""Arrow type of each BigQuery type, as the Storage Read API returns it."""
EXTENSION = b"ARROW:extension:name"
EXTENSIONS = {"JSON": b"google:sqlType:json", "GEOGRAPHY": b"google:sqlType:geography"}
"""Field metadata that marks Arrow strings as another BigQuery type."""
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,299}")
RESERVED_PREFIXES = (
    "_table_",
    "_file_",
    "_partition",
    "_row_timestamp",
    "__root__",
    "_colidentifier",
    "_change_sequence_number",
    "_change_type",
    "_change_timestamp",
)


def arrow_schema(fields: Sequence[SchemaField], uri: str) -> pa.Schema:
    """Return the Arrow schema of a BigQuery table.

    Raises:
        OptionsError: a column's type has no Arrow equivalent.
    """
    return pa.schema([_arrow_field(field, uri, is_nested=False) for field in fields])


def _arrow_field(field: SchemaField, uri: str, *, is_nested: bool) -> pa.Field:
    kind, extension = _arrow_type(field, uri), EXTENSIONS.get(field.field_type)
    if field.mode == "REPEATED":
        kind = pa.list_(kind)
    # Arrow cannot cast a struct to one that has a non-nullable field.
    is_nullable = is_nested or field.mode == "NULLABLE"
    return pa.field(field.name, kind, is_nullable, extension and {EXTENSION: extension})


def _arrow_type(field: SchemaField, uri: str) -> pa.DataType:
    if field.field_type in ("RECORD", "STRUCT"):
        return pa.struct([_arrow_field(inner, uri, is_nested=True) for inner in field.fields])
    if field.field_type not in ARROW_TYPES:
        raise OptionsError(
            f"{uri}: column {field.name!r}: expected a type that can be read, got "
            f"{field.field_type}; leave it out with --columns or cast it in a --query"
        )
    return ARROW_TYPES[field.field_type]


def table_schema(schema: pa.Schema) -> list[SchemaField]:
    """Return the BigQuery schema for loading Parquet files of an Arrow schema.

    Raises:
        OptionsError: BigQuery does not support the name or type of a column.
    """
    return _table_fields(list(schema), path="")


def conformed(
    fields: Sequence[SchemaField], existing: Sequence[SchemaField], uri: str, path: str = ""
) -> list[SchemaField]:
    """Return the fields of an existing table that match the columns of rows to append.

    Args:
        fields: The columns of the new rows.
        existing: All fields of the existing table.
        uri: The URI of the table.
        path: Path of the struct that holds the fields, with a trailing dot.

    Raises:
        OptionsError: the table cannot hold such rows.
    """
    by_name = {field.name.lower(): field for field in existing}
    needed = {name for name, field in by_name.items() if field.mode == "REQUIRED"}
    if missing := sorted(needed - {field.name.lower() for field in fields}):
        raise OptionsError(
            f"{uri}: expected a value for its column {path + missing[0]!r}, which must have one, "
            "got no such column; pass --overwrite or choose another table"
        )
    for field in fields:
        there = by_name.get(field.name.lower())
        if there is None or _kind(there) != _kind(field) or _is_stricter(there, field):
            raise OptionsError(
                f"{uri}: expected a column {path + field.name!r} of type {_kind(field)}, "
                f"{field.mode}, got {'none' if there is None else f'{_kind(there)}, {there.mode}'}"
                "; pass --overwrite or choose another table"
            )
        conformed(field.fields, there.fields, uri, f"{path}{field.name}.")
    return [by_name[field.name.lower()] for field in fields]


def _kind(field: SchemaField) -> str:
    return f"{'REPEATED ' if field.mode == 'REPEATED' else ''}{field.field_type}"


def _is_stricter(there: SchemaField, field: SchemaField) -> bool:
    return there.mode == "REQUIRED" and field.mode == "NULLABLE"


def _table_fields(fields: Sequence[pa.Field], path: str) -> list[SchemaField]:
    names: dict[str, str] = {}
    for field in fields:
        _check_name(field.name, path)
        if (known := names.setdefault(field.name.lower(), field.name)) != field.name:
            raise OptionsError(
                f"column {path}{field.name!r}: BigQuery takes it for {known!r}, since it does not "
                "tell upper case from lower; rename one of them in the input"
            )
    return [_table_field(field, path + field.name) for field in fields]


def _check_name(name: str, path: str) -> None:
    if not COLUMN_NAME.fullmatch(name) or name.lower().startswith(RESERVED_PREFIXES):
        raise OptionsError(
            f"column {path}{name!r}: expected a name that BigQuery allows, at most 300 letters "
            "A to Z, digits and underscores, that begins with no digit and no reserved prefix; "
            "rename it in the input"
        )


def _table_field(field: pa.Field, path: str) -> SchemaField:
    kind, mode = field.type, "NULLABLE" if field.nullable else "REQUIRED"
    if _is_list(kind):
        kind, mode = _value_type(kind.value_type), "REPEATED"
    kind = _value_type(kind)
    if pa.types.is_struct(kind):
        return SchemaField(field.name, "RECORD", mode, fields=_table_fields(list(kind), f"{path}."))
    return SchemaField(field.name, _scalar(field, kind, path), mode)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the value type of a dictionary type, which Parquet files store, or the type itself."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in is_list)


def _scalar(field: pa.Field, kind: pa.DataType, path: str) -> str:
    """Return the BigQuery type of a field that is neither a struct nor a list."""
    extension = (field.metadata or {}).get(EXTENSION)
    if extension == EXTENSIONS["JSON"]:
        raise OptionsError(
            f"column {path!r}: expected a type that BigQuery loads from files, got JSON; make "
            "a text of it with TO_JSON_STRING in a --query"
        )
    if extension == EXTENSIONS["GEOGRAPHY"]:
        return "GEOGRAPHY"
    for of_kind, name in _SCALARS:
        if of_kind(kind):
            return name
    if _is_list(kind):
        raise OptionsError(
            f"column {path!r}: expected no list of lists, which BigQuery does not have, got "
            f"{field.type}; leave it out with --columns"
        )
    raise OptionsError(
        f"column {path!r}: expected a type that BigQuery has, got {field.type}; cast it in the "
        "input or leave it out with --columns"
    )


def _is_small_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) and not pa.types.is_uint64(kind)


def _is_float(kind: pa.DataType) -> bool:
    return pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _fits(digits: int, scale: int, kind: pa.DataType) -> bool:
    """Return whether a decimal has at most `digits` before the point and `scale` after it."""
    return (
        pa.types.is_decimal(kind)
        and 0 <= kind.scale <= scale
        and kind.precision - kind.scale <= digits
    )


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks) or pa.types.is_binary_view(kind)


def _is_timestamp(kind: pa.DataType, *, has_zone: bool) -> bool:
    """Return whether a timestamp is no finer than microseconds, BigQuery's precision."""
    return pa.types.is_timestamp(kind) and kind.unit != "ns" and (kind.tz is not None) == has_zone


_SCALARS = (
    (pa.types.is_boolean, "BOOLEAN"),
    (_is_small_integer, "INTEGER"),
    (_is_float, "FLOAT"),
    (_is_text, "STRING"),
    (_is_bytes, "BYTES"),
    (lambda kind: _fits(29, 9, kind), "NUMERIC"),
    (lambda kind: _fits(38, 38, kind), "BIGNUMERIC"),
    (pa.types.is_date, "DATE"),
    (lambda kind: pa.types.is_time(kind) and kind.unit != "ns", "TIME"),
    (lambda kind: _is_timestamp(kind, has_zone=True), "TIMESTAMP"),
    (lambda kind: _is_timestamp(kind, has_zone=False), "DATETIME"),
)
