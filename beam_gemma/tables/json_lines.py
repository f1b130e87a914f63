"""Convert JSON lines to Arrow batches and back.

Column types are inferred once from all lines before a job starts, and workers parse with them.
Text that looks like a time stays text.
"""

import base64
import datetime
import decimal
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.json

from beam_gemma.errors import OptionsError

CHUNK_BYTES = 8 << 20
"""Bytes of lines parsed together during type inference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive lines of a file."""

    schema: pa.Schema
    num_rows: int
    num_bytes: int
    """Size in bytes, including empty lines."""


def chunks(lines: Iterable[bytes], name: str, *, limit: int | None = None) -> Iterator[Chunk]:
    """Infer the schemas of the lines of a file, chunk by chunk.

    Args:
        lines: The lines of the file, in order.
        name: The file name for error messages.
        limit: Number of rows to read; None for all.

    Raises:
        OptionsError: a line is not a JSON object, or a column has values of several types.
    """
    rows: dict[int, bytes] = {}
    num_bytes = 0
    for number, line in enumerate(lines, start=1):
        if limit is not None and limit <= 0:
            break
        num_bytes += len(line)
        if not line.isspace():
            rows[number] = line
            limit = None if limit is None else limit - 1
        if num_bytes >= CHUNK_BYTES:
            yield _chunk(rows, num_bytes, name)
            rows, num_bytes = {}, 0
    if rows:
        yield _chunk(rows, num_bytes, name)


def unify_schemas(first: pa.Schema, second: pa.Schema, name: str) -> pa.Schema:
    """Return the schema that covers both; integers widen to floats if needed.

    Raises:
        OptionsError: a column has incompatible types; the message starts with `name`.
    """
    try:
        return pa.unify_schemas([first, second], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise OptionsError(
            f"{name}: expected the column types of the rows before it, got: {error}"
        ) from error


def parse_lines(lines: Sequence[bytes], schema: pa.Schema | None = None) -> pa.RecordBatch:
    """Parse one row per line; without a schema, the types are inferred.

    Raises:
        pyarrow.ArrowInvalid: a line is not an object that fits the schema.
    """
    data = b"\n".join(lines)
    data.decode()
    table = pyarrow.json.read_json(
        pa.BufferReader(data),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=schema,
            unexpected_field_behavior="infer" if schema is None else "error",
        ),
    )
    if table.num_rows != len(lines):
        raise pa.ArrowInvalid(f"expected {len(lines)} objects, one on each line")
    (batch,) = table.combine_chunks().to_batches()
    return batch


def format_rows(batch: pa.RecordBatch) -> bytes:
    """Return one JSON line per row.

    Times are written in ISO 8601, decimals as text, bytes in base64; NaN and infinity, which JSON
    lacks, become null.
    """
    columns = pa.schema([pa.field(f.name, _representable(f.type)) for f in batch.schema])
    rows = batch.cast(columns, safe=False).to_pylist(maps_as_pydicts="lossy")
    return "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows).encode()


def content_lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Return the lines of a file that are not blank."""
    return (line for line in stream if not line.isspace())


def _chunk(rows: dict[int, bytes], num_bytes: int, name: str) -> Chunk:
    schema = _schema_of(rows, name) if rows else pa.schema([])
    return Chunk(schema=schema, num_rows=len(rows), num_bytes=num_bytes)


def _schema_of(chunk: dict[int, bytes], name: str) -> pa.Schema:
    try:
        batch = parse_lines(list(chunk.values()))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        _refuse_malformed(chunk, name)
        raise OptionsError(f"{name}: expected one type in each column, got: {error}") from error
    return pa.schema([pa.field(f.name, _without_times(f.type)) for f in batch.schema])


def _refuse_malformed(chunk: dict[int, bytes], name: str) -> None:
    for number, line in chunk.items():
        try:
            value = json.loads(line)
        except ValueError as error:
            raise OptionsError(
                f"{name}, line {number}: expected a JSON object, got an error: {error}"
            ) from error
        if not isinstance(value, dict):
            raise OptionsError(
                f"{name}, line {number}: expected a JSON object, got {type(value).__name__}"
            )


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Return the type with string in place of inferred time types."""
    if pa.types.is_temporal(kind):
        return pa.string()
    return _mapped(kind, _without_times)


def _representable(kind: pa.DataType) -> pa.DataType:
    """Return the type with nanoseconds cut to microseconds, the finest that Python holds."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_duration(kind):
        return pa.duration("us")
    return _mapped(kind, _representable)


def _mapped(kind: pa.DataType, change: Any) -> pa.DataType:
    """Return a nested type with `change` applied to its inner types."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(change(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(change(kind.value_type)))
    return kind


def _plain(value: Any) -> Any:
    """Return the value in a form that `json.dumps` accepts."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal():
            return str(value)
        case _:
            return value
