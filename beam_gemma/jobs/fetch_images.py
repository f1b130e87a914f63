"""Pictures of a table's rows: bytes stay, and files that rows name are read beside inference.

Afterwards a column of pictures is a list for each row, of bytes or of the error that reading them
met, whatever its type in the table is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from beam_gemma.batches import Located, is_json_text
from beam_gemma.inference.image_files import (
    IMAGE,
    ImageReading,
    begin_reading,
    read_ahead,
    unreadable,
)
from beam_gemma.inputs.chat_template import PICTURE_KEYS
from beam_gemma.tasks.columns import inner_fields

IMAGE_LIST = pa.list_(IMAGE)
"""Type of a column of pictures once they are fetched."""
SLICE_ROWS = 16
SLICE_BYTES = 32 << 20
"""Limits of one batch with pictures: at most `SLICE_ROWS` rows, about `SLICE_BYTES` bytes."""
IMAGE_TYPE = '"image"'
"""Text that JSON of a conversation with a picture holds: the type of a part."""
Images = list[dict[str, Any] | None] | None
"""The pictures of a row in one column, as `IMAGE_LIST` has them."""


def fetched(located: Located, columns: Sequence[str], reading: ImageReading) -> Iterator[Located]:
    """Yield rows in small batches, with their pictures as `IMAGE_LIST`.

    Files of the next rows are read while the caller works on a batch.

    Args:
        located: The rows.
        columns: Their columns of pictures.
        reading: The limits of reading files.
    """
    position, batch = located
    values = [batch.column(name) for name in columns]
    begun = (
        {name: _begin(column[index], reading) for name, column in zip(columns, values, strict=True)}
        for index in range(batch.num_rows)
    )
    held: list[Mapping[str, Images]] = []
    num_bytes, start = 0, 0
    for row in read_ahead(begun):
        held.append(row)
        num_bytes += sum(map(_num_bytes, row.values()))
        if len(held) == SLICE_ROWS or num_bytes >= SLICE_BYTES:
            yield position + start, _with_images(batch.slice(start, len(held)), columns, held)
            start += len(held)
            held, num_bytes = [], 0
    if held:
        yield position + start, _with_images(batch.slice(start, len(held)), columns, held)


def in_slices(located: Located, column: str | None) -> Iterator[Located]:
    """Yield rows whose conversations bring pictures in batches as small as `fetched` makes them.

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
    """Return rows to show people, with the sizes of pictures in place of their bytes."""
    for name in columns:
        values = rows.column(name).to_pylist()
        shown = [_described(value) for value in values]
        if shown != values:
            rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(shown))
    return rows


def _described(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"picture, {len(value):,} bytes"
    if isinstance(value, Mapping):
        return {name: _described(item) for name, item in value.items()}
    return [_described(item) for item in value] if isinstance(value, list) else value


def _may_show(field: pa.Field, column: pa.Array) -> bool:
    """Return whether parts of conversations may bring pictures."""
    if is_json_text(field):
        return bool(pc.any(pc.match_substring(column, IMAGE_TYPE)).as_py())
    parts = inner_fields(inner_fields(field.type).get("content"))
    return bool(parts.keys() & set(PICTURE_KEYS))


def _begin(value: pa.Scalar, reading: ImageReading) -> list[Any] | None:
    """Return the pictures of a value; those in files are begun to be read."""
    try:
        found = value.as_py()
    except (ValueError, OverflowError) as error:
        return [unreadable(f"expected a value that Python can hold, got an error: {error}")]
    if found is None:
        return None
    items = found if isinstance(found, list) else [found]
    return [begin_reading(item, reading) for item in items]


def _num_bytes(images: Images) -> int:
    files = [image["bytes"] for image in images or () if image is not None]
    return sum(len(file) for file in files if file is not None)


def _with_images(
    batch: pa.RecordBatch, columns: Sequence[str], rows: Sequence[Mapping[str, Images]]
) -> pa.RecordBatch:
    """Return rows with their columns of pictures replaced."""
    for name in columns:
        at = batch.schema.get_field_index(name)
        images = pa.array([row[name] for row in rows], IMAGE_LIST)
        batch = batch.set_column(at, pa.field(name, IMAGE_LIST), images)
    return batch
