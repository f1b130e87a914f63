"""Pictures and sounds of a table's rows: bytes stay, and files that rows name are read.

Afterwards a column of them is a list for each row, of bytes or of the error that reading them met,
whatever its type in the table is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from beam_gemma.batches import Located, is_json_text
from beam_gemma.inference.media_files import (
    FILE,
    FileReading,
    MediaReading,
    begin_reading,
    read_ahead,
    unreadable,
)
from beam_gemma.inputs.chat_template import MEDIA_KEYS
from beam_gemma.inputs.row import MediaKind
from beam_gemma.tasks.columns import inner_fields

FILE_LIST = pa.list_(FILE)
"""Type of a column of pictures or sounds once they are fetched."""
SLICE_ROWS = 16
SLICE_BYTES = 32 << 20
"""Limits of one batch with files: at most `SLICE_ROWS` rows, about `SLICE_BYTES` bytes."""
Files = list[dict[str, Any] | None] | None
"""The pictures or sounds of a row in one column, as `FILE_LIST` has them."""


def fetched(
    located: Located, columns: Mapping[str, MediaKind], reading: MediaReading
) -> Iterator[Located]:
    """Yield rows in small batches, with their pictures and sounds as `FILE_LIST`.

    Files of the next rows are read while the caller works on a batch.

    Args:
        located: The rows.
        columns: Their columns of pictures and sounds, with the kind of each.
        reading: The limits of reading files.
    """
    position, batch = located
    values = {name: (batch.column(name), reading.of(kind)) for name, kind in columns.items()}
    begun = (
        {name: _begin(column[index], limits) for name, (column, limits) in values.items()}
        for index in range(batch.num_rows)
    )
    held: list[Mapping[str, Files]] = []
    num_bytes, start = 0, 0
    for row in read_ahead(begun):
        held.append(row)
        num_bytes += sum(map(_num_bytes, row.values()))
        if len(held) == SLICE_ROWS or num_bytes >= SLICE_BYTES:
            yield position + start, _with_files(batch.slice(start, len(held)), columns, held)
            start += len(held)
            held, num_bytes = [], 0
    if held:
        yield position + start, _with_files(batch.slice(start, len(held)), columns, held)


def in_slices(located: Located, column: str | None) -> Iterator[Located]:
    """Yield rows whose conversations bring files in batches as small as `fetched` makes them.

    Args:
        located: The rows; others are yielded as they are.
        column: Their column of conversations; None if they have none.
    """
    position, batch = located
    size = SLICE_ROWS
    if column is None or not _may_show(batch.schema.field(column), batch.column(column)):
        size = max(1, batch.num_rows)
    for start in range(0, batch.num_rows, size):
        yield position + start, batch.slice(start, size)


def described(rows: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """Return rows to show people, with the sizes of files in place of their bytes."""
    for name in columns:
        values = rows.column(name).to_pylist()
        shown = [_described(value) for value in values]
        if shown != values:
            rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(shown))
    return rows


def _described(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"file, {len(value):,} bytes"
    if isinstance(value, Mapping):
        return {name: _described(item) for name, item in value.items()}
    return [_described(item) for item in value] if isinstance(value, list) else value


def _may_show(field: pa.Field, column: pa.Array) -> bool:
    """Return whether parts of conversations may bring pictures or sounds."""
    if is_json_text(field):
        # JSON of a conversation with a file holds the type of a part.
        return any(pc.any(pc.match_substring(column, f'"{k}"')).as_py() for k in MEDIA_KEYS)
    parts = inner_fields(inner_fields(field.type).get("content"))
    return any(parts.keys() & set(keys) for keys in MEDIA_KEYS.values())


def _begin(value: pa.Scalar, reading: FileReading) -> list[Any] | None:
    """Return the pictures or sounds of a value; those in files are begun to be read."""
    try:
        found = value.as_py()
    except (ValueError, OverflowError) as error:
        return [unreadable(f"expected a value that Python can hold, got an error: {error}")]
    if found is None:
        return None
    items = found if isinstance(found, list) else [found]
    return [begin_reading(item, reading) for item in items]


def _num_bytes(files: Files) -> int:
    found = [file["bytes"] for file in files or () if file is not None]
    return sum(len(content) for content in found if content is not None)


def _with_files(
    batch: pa.RecordBatch, columns: Iterable[str], rows: Sequence[Mapping[str, Files]]
) -> pa.RecordBatch:
    """Return rows with their columns of files replaced."""
    for name in columns:
        at = batch.schema.get_field_index(name)
        files = pa.array([row[name] for row in rows], FILE_LIST)
        batch = batch.set_column(at, pa.field(name, FILE_LIST), files)
    return batch
