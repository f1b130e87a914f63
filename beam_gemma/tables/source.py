"""Interface of input tables: schema, size, and parts that workers read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from beam_gemma.batches import Located
from beam_gemma.errors import OptionsError, nearest

BATCH_ROWS = 16_384
BATCH_BYTES = 8 << 20
"""Limits of one batch in the pipeline: at most `BATCH_ROWS` rows, about `BATCH_BYTES` bytes."""
SAMPLE_ROWS = 1000
SAMPLE_PLACES = 10
"""A preview samples `SAMPLE_ROWS` rows from `SAMPLE_PLACES` places across a table."""


class Source(ABC):
    """A table to read.

    Each row has a position, which is the same each time it is read, on any worker.
    """

    uri: str
    schema: pa.Schema
    num_rows: int | None
    """Number of rows to read; None if unknown."""
    num_bytes: int
    """Approximate size of the data, in bytes."""
    is_dense: bool
    """True if positions count rows from 0 without gaps."""
    files: tuple[str, ...] = ()
    """Files to read, if the table consists of files."""
    folder: str | None = None
    """Folder of the table, if it consists of files: where paths in its rows start from."""
    copies: str | None = None
    """Folder of temporary copies to read from; may be deleted after the last read."""

    @abstractmethod
    def parts(self) -> list[Any]:
        """Return the initial parts at launch: few, and small enough to send with the job."""

    def split(self, part: Any) -> Iterator[Any]:
        """Split a part, on a worker, into the parts that are read one by one."""
        yield part

    @abstractmethod
    def read(self, part: Any) -> Iterator[Located]:
        """Return the rows of a part, on a worker, in the source's schema without metadata."""

    @abstractmethod
    def head(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return the first rows, at launch, reading as little as possible."""

    @abstractmethod
    def sample(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Return rows from several places in the table, at launch, or all rows if it has fewer."""

    @property
    def expected_rows(self) -> int | None:
        """Approximate number of rows; None if there is no estimate."""
        return self.num_rows


def leading_rows(source: Source, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Return the first rows of a table by reading the parts that hold them.

    Args:
        source: The table; its parts are dataclasses with `first_row` and `num_rows`, in order.
        num_rows: Number of rows to return.
    """
    for part in source.parts():
        rows = min(part.num_rows, num_rows - part.first_row)
        if rows <= 0:
            return
        yield from (batch for _, batch in source.read(replace(part, num_rows=rows)))


def batch_rows(row_bytes: int) -> int:
    """Return the most rows of a batch, for rows of about this size in bytes."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def fills_batch(num_rows: int, num_bytes: int) -> bool:
    """Return whether rows are as many as a batch holds, by their number or size in bytes."""
    return num_rows >= BATCH_ROWS or num_bytes >= BATCH_BYTES


def sample_places(size: int) -> list[int]:
    """Return `SAMPLE_PLACES` evenly spaced offsets into a table of this size, from 0 on."""
    return [size * i // SAMPLE_PLACES for i in range(SAMPLE_PLACES)]


def selected(schema: pa.Schema, columns: tuple[str, ...] | None, uri: str) -> pa.Schema:
    """Return the schema of the requested columns, in the requested order.

    Raises:
        OptionsError: a column does not exist.
    """
    if columns is None:
        return schema
    check_selected(schema.names, columns, uri)
    return pa.schema([schema.field(column) for column in columns], schema.metadata)


def check_selected(names: Sequence[str], columns: Sequence[str], uri: str) -> None:
    """Check that a table has the requested columns.

    Raises:
        OptionsError: a column does not exist.
    """
    for column in columns:
        if column not in names:
            raise OptionsError(
                f"--columns: expected columns of {uri}, got {column!r}{nearest(column, names)}"
            )
