"""Examples: the forms in which rows reach inference, and how they cross between processes."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import pyarrow as pa
from apache_beam.pvalue import Row

from beam_gemma.batches import RecordBatchCoder
from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Row as Columns

Example: TypeAlias = str | Mapping[str, Any] | Row | tuple[Any, ...] | pa.RecordBatch
"""A Row that has been between two steps comes as a named tuple."""


class PortableBatch:
    """A record batch that pickles as an Arrow stream, once for all of its rows."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _decode, (RecordBatchCoder().encode(self.batch),)


class BatchRow(Mapping[str, Any]):
    """One row of a record batch; a value becomes a Python object when it is asked for."""

    def __init__(self, portable: PortableBatch, index: int) -> None:
        self._portable = portable
        self._index = index

    def __getitem__(self, column: str) -> Any:
        batch = self._portable.batch
        position = batch.schema.get_field_index(column)
        if position < 0:
            raise KeyError(column)
        try:
            return batch.column(position)[self._index].as_py()
        except (ValueError, OverflowError) as error:
            raise RecordError(
                f"column {column!r}: expected a value that Python can hold, got an error: {error}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._portable.batch.schema.names)

    def __len__(self) -> int:
        return self._portable.batch.num_columns

    def __contains__(self, column: object) -> bool:
        return column in self._portable.batch.schema.names


def rows_of(example: Example) -> list[Columns]:
    """Return the rows of an example; they pickle without what a record batch is cut of."""
    if isinstance(example, pa.RecordBatch):
        portable = PortableBatch(example)
        return [BatchRow(portable, index) for index in range(example.num_rows)]
    return [as_mapping(example)]


def num_rows(example: Any) -> int:
    """Return the rows of an example; KeyedModelHandler puts its key before it."""
    if isinstance(example, tuple) and len(example) == 2 and not hasattr(example, "_fields"):
        example = example[1]
    return example.num_rows if isinstance(example, pa.RecordBatch) else 1


def num_bytes(value: Any) -> int:
    """Return the bytes of a value's content; a number counts as eight."""
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
        case _:
            return 8


def as_mapping(row: Any) -> Any:
    """Return a Beam Row, or the named tuple that its coder makes of it, as a mapping."""
    if isinstance(row, Row):
        return row.as_dict()
    return row._asdict() if hasattr(row, "_asdict") else row


def _decode(encoded: bytes) -> PortableBatch:
    return PortableBatch(RecordBatchCoder().decode(encoded))
