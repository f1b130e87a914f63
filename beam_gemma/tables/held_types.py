"""What each file format holds: every column is written, as another type, or refused at launch."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from beam_gemma.errors import OptionsError
from beam_gemma.tables.json_types import typed_form
from beam_gemma.tables.sink import Format


def held_schema(schema: pa.Schema, file_format: Format) -> pa.Schema:
    """Return the schema of a table's columns in files of a format.

    JSON lines have a form for every value. In Parquet, JSON text gets the type that holds its
    values, if there is one; otherwise it stays text.

    Raises:
        OptionsError: the format cannot hold a column.
    """
    for field in schema:
        if (lacking := _lacking(field.type, file_format)) is not None:
            raise OptionsError(
                f"column {field.name!r}: expected a type that .{file_format} files hold, got "
                f"{lacking}; cast it in the input or leave it out with --columns"
            )
    if file_format == "jsonl":
        return schema
    return pa.schema([typed_form(field) for field in schema], schema.metadata)


def _lacking(kind: pa.DataType, file_format: Format) -> pa.DataType | None:
    """Return the part of a type that a format does not hold; None if it holds all of it."""
    if any(is_kind(kind) for is_kind in _LACKING[file_format]):
        return kind
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inner = [kind.value_type]
    lacking = (_lacking(each, file_format) for each in inner)
    return next((found for found in lacking if found is not None), None)


def _is_interval(kind: pa.DataType) -> bool:
    return kind == pa.month_day_nano_interval()


_ANYWHERE: tuple[Callable[[pa.DataType], Any], ...] = (pa.types.is_union, _is_interval)
_LACKING: dict[Format, tuple[Callable[[pa.DataType], Any], ...]] = {
    "jsonl": _ANYWHERE,
    "parquet": (
        *_ANYWHERE,
        pa.types.is_run_end_encoded,
        lambda kind: pa.types.is_struct(kind) and not kind.num_fields,
        lambda kind: pa.types.is_decimal(kind) and kind.scale < 0,
    ),
}
