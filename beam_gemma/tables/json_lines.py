"""Convert JSON lines to Arrow batches and back.

Column types are found once, from all lines, before a job starts; workers parse with them. Text that
looks like a time stays text. What a row says does not depend on the rows beside it.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from beam_gemma.batches import is_json_text
from beam_gemma.errors import OptionsError
from beam_gemma.tables.json_types import KINDS, Values
from beam_gemma.tables.json_values import column_values

CHUNK_BYTES = 8 << 20
"""Bytes of lines parsed together during type inference."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive lines of a file."""

    num_rows: int
    num_bytes: int
    """Size in bytes, including empty lines."""


class Columns:
    """The columns found so far.

    Args:
        wanted: Names of the columns to find the types of; None for all. The values of others may
            be of any kind.
    """

    def __init__(self, wanted: Sequence[str] | None = None) -> None:
        self._wanted = wanted
        self._values: dict[str, Values] = {}
        self._names: dict[str, None] = {}

    @property
    def names(self) -> list[str]:
        """Names of all columns, in the order in which they were found."""
        return list(self._names)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns that are wanted."""
        return pa.schema([values.field(name) for name, values in self._values.items()])

    def add(self, rows: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
        """Take account of rows.

        Args:
            rows: The rows.
            place: Returns the name of the file and line of a row, for error messages.

        Raises:
            OptionsError: a column has values of several kinds, such as numbers and texts.
        """
        self._names |= dict.fromkeys(itertools.chain.from_iterable(rows))
        for name in self._names:
            if self._wanted is None or name in self._wanted:
                column = [row.get(name) for row in rows]
                known = self._values.setdefault(name, Values())
                _check_kinds(name, known, column, place)
                known.add(column)


def _check_kinds(
    name: str, known: Values, column: Sequence[Any], place: Callable[[int], str]
) -> None:
    """Refuse a column with values of several kinds; name the first one that differs."""
    kinds = {KINDS[kind] for kind in known.kinds}
    for index, value in enumerate(column) if len(kinds | _kinds_of(column)) > 1 else ():
        kinds |= _kinds_of([value])
        if len(kinds) > 1:
            (found,) = _kinds_of([value])
            (before,) = kinds - {found}
            raise OptionsError(
                f"{place(index)}: column {name!r}: expected {before}, as in the rows before it, "
                f"got {found}; make all values of one kind, or leave the column out with --columns"
            )


def _kinds_of(values: Iterable[Any]) -> set[str]:
    return {KINDS[kind] for kind in set(map(type, values)) if kind is not type(None)}


def chunks(
    lines: Iterable[bytes],
    name: str,
    columns: Columns,
    *,
    limit: int | None = None,
    lines_before: Callable[[], int] = lambda: 0,
) -> Iterator[Chunk]:
    """Find the columns of the lines of a file, chunk by chunk.

    Args:
        lines: Consecutive lines of the file.
        name: The file name for error messages.
        columns: The columns of the table so far, to which those of these lines are added.
        limit: Number of rows to read; None for all.
        lines_before: Returns the number of lines of the file before these; asked for errors only.

    Raises:
        OptionsError: a line is not a JSON object, or a column has values of several kinds.
    """
    rows: dict[int, bytes] = {}
    num_bytes = 0

    def place(index: int) -> str:
        return f"{name}, line {lines_before() + list(rows)[index]}"

    for number, line in enumerate(lines, start=1):
        if limit is not None and limit <= 0:
            break
        num_bytes += len(line)
        if not line.isspace():
            rows[number] = line
            limit = None if limit is None else limit - 1
        if num_bytes >= CHUNK_BYTES:
            yield _chunk(rows.values(), num_bytes, columns, place)
            rows, num_bytes = {}, 0
    if rows:
        yield _chunk(rows.values(), num_bytes, columns, place)


def content_lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Return the lines of a file that are not blank."""
    return (line for line in stream if not line.isspace())


def parse_lines(lines: Sequence[bytes], schema: pa.Schema) -> pa.RecordBatch:
    """Parse one row per line into the columns of a schema; other columns are left out.

    Raises:
        ValueError: a line is not an object, or its values do not fit the schema.
    """
    rows = [_row(line) for line in lines]
    columns = [_column(field, [row.get(field.name) for row in rows]) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def format_rows(batch: pa.RecordBatch) -> bytes:
    """Return one JSON line per row, with the values of `json_values`."""
    columns = [column_values(field, batch.column(i)) for i, field in enumerate(batch.schema)]
    names = batch.schema.names
    rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def with_typed_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return rows with their JSON text parsed where the schema has another type for it."""
    columns = list(batch.columns)
    for i, (ours, wanted) in enumerate(zip(batch.schema, schema, strict=True)):
        if is_json_text(ours) and ours.type != wanted.type:
            columns[i] = pa.array(column_values(ours, columns[i]), wanted.type)
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _chunk(
    lines: Iterable[bytes], num_bytes: int, columns: Columns, place: Callable[[int], str]
) -> Chunk:
    rows = []
    for index, line in enumerate(lines):
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise OptionsError(
                f"{place(index)}: expected a JSON object, got an error: {error}"
            ) from error
    columns.add(rows, place)
    return Chunk(num_rows=len(rows), num_bytes=num_bytes)


def _row(line: bytes) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        ValueError: it has none, or what it has cannot be held.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object, parse_float=_float)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deeply; flatten them") from error
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__}, no object")
    # Escapes may give halves of characters, which no text has.
    if ESCAPED_SURROGATE.search(line) and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise ValueError("the surrogate pair of a character is not whole")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"an object has {name!r} twice")
    return found


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large for a double")
    return number


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    """Return the values of a column, exactly."""
    if is_json_text(field):
        return pa.array([None if v is None else _text(v) for v in values], field.type)
    column = pa.array(values, field.type)
    back = column.to_pylist()
    # As text, for NaN is not equal to itself.
    if back != values and _text(back) != _text(values):
        raise ValueError(f"column {field.name!r}: values that are no {field.type}")
    return column


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
