"""Examples: the forms of rows that inference accepts."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import pyarrow as pa
from apache_beam.pvalue import Row

from beam_gemma.batches import python_value
from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Row as Columns
from beam_gemma.tasks.row_keys import ENCODED, FILES

Example: TypeAlias = str | Mapping[str, Any] | Row | tuple[Any, ...] | pa.RecordBatch
"""Input of inference; a Beam Row that has passed between two steps is a named tuple."""


class BatchRow(Mapping[str, Any]):
    """One row of a record batch; values become Python objects on access."""

    def __init__(self, batch: pa.RecordBatch, index: int) -> None:
        self._batch = batch
        self._index = index

    def __getitem__(self, column: str) -> Any:
        position = self._batch.schema.get_field_index(column)
        if position < 0:
            raise KeyError(column)
        try:
            value = self._batch.column(position)[self._index]
            return python_value(self._batch.schema.field(position), value)
        except (ValueError, OverflowError) as error:
            raise RecordError(
                f"column {column!r}: expected a value that Python can hold, got an error: {error}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns

    def __contains__(self, column: object) -> bool:
        return column in self._batch.schema.names


def rows_of(example: Example) -> list[Columns]:
    """Return the rows of an example."""
    if isinstance(example, pa.RecordBatch):
        return [BatchRow(example, index) for index in range(example.num_rows)]
    return [as_mapping(example)]


def num_rows(example: Any) -> int:
    """Return the number of rows of an example, which KeyedModelHandler pairs with its key."""
    if isinstance(example, tuple) and len(example) == 2 and not hasattr(example, "_fields"):
        example = example[1]
    return example.num_rows if isinstance(example, pa.RecordBatch) else 1


def weight(example: Any, full: int, full_bytes: int) -> int:
    """Return what an example with pictures counts for in a batch: its rows, or more if it is large.

    Args:
        example: The example.
        full: What a full batch counts for, which is the most that is returned.
        full_bytes: Bytes that fill a batch.
    """
    size = num_bytes(example)
    if isinstance(example, pa.RecordBatch) and ENCODED in example.schema.names:
        size = example.column(FILES).nbytes if FILES in example.schema.names else 0
    return max(num_rows(example), min(full, -(-size * full // full_bytes)))


def num_bytes(value: Any) -> int:
    """Return the size of a value's content in bytes; a number counts as eight."""
    match as_mapping(value):
        case pa.RecordBatch():
            return value.nbytes
        case str():
            return len(value.encode(errors="surrogatepass"))
        case bytes():
            return len(value)
        case Mapping() as mapping:
            return sum(map(num_bytes, mapping.values()))
        case list() | tuple() as items:
            return sum(map(num_bytes, items))
        case None:
            return 0
        case _ if hasattr(value, "getbands"):  # a picture of Pillow
            return value.width * value.height * len(value.getbands())
        case _:
            return 8


def as_mapping(row: Any) -> Any:
    """Return a Beam Row, or its decoded named tuple, as a mapping; other values unchanged."""
    if isinstance(row, Row):
        return row.as_dict()
    return row._asdict() if hasattr(row, "_asdict") else row
